"""Fixtures of the crash tests. CXRBATCH_CRASH_N says how much of each test runs (see the Makefile)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server import OwnPostgres

from factories import make_bundle
from watchers import Place, some_files


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> dict[str, tuple[Any, ...]]:
    """The rows of `some_files` after an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Place(folder, f"sqlite:///{folder}/store.db", bundle)
    some_files(place.incoming)
    assert place.run("--once", CXRBATCH_TRUNCATED_TRIES="1") == 3
    rows = place.rows()
    assert rows.keys() == place.files()
    return rows


@pytest.fixture
def new_place(tmp_path: Path, bundle: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Place]]:
    """Creates a `Place` with `some_files` and a new store, "sqlite" or "postgres"."""
    made: list[Place] = []

    def new(kind: str) -> Place:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        url = f"sqlite:///{folder}/store.db"
        if kind == "postgres":
            url = request.getfixturevalue("new_postgres")()
        place = Place(folder, url, bundle)
        some_files(place.incoming)
        made.append(place)
        return place

    yield new
    for place in made:
        place.clean_up()
        shutil.rmtree(place.cwd, ignore_errors=True)


@pytest.fixture
def own_postgres() -> Iterator[OwnPostgres]:
    server = OwnPostgres()
    yield server
    server.remove()
