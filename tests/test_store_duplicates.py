"""Two data sets with one SOP Instance UID are two rows, and audit says so once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import select

from cxrbatch.errors import ReasonCode, Retry
from cxrbatch.instance_names import duplicate_file_name, file_name
from cxrbatch.store import Run, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.schema import audit
from cxrbatch.types import Outcome
from store_images import CASCADE, found, reject, scored_file

FIRST = "/in/" + file_name("1.2.3.4")
SECOND, THIRD = (duplicate_file_name(FIRST, digit * 64) for digit in "23")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run("{}", CASCADE, device="cpu", engine="torch", host="here", version="0.1.0")


def noted(store: Store) -> list[tuple[str, bool, bool]]:
    """Path, whether the first content is named, whether its own is."""
    query = select(audit).where(audit.c.event == "duplicate_instance").order_by(audit.c.id)
    with connect(store.engine) as connection:
        return [(row.path, row.old is not None, row.new is not None) for row in connection.execute(query)]


def test_a_duplicate_instance_is_noted_once_with_both_contents(store: Store, run: Run) -> None:
    store.record(
        run.run_id, run.cascade_id, [scored_file(FIRST, content="a"), scored_file("/in/other.dcm", content="x")]
    )
    assert noted(store) == []
    for _ in range(2):
        store.record(run.run_id, run.cascade_id, [scored_file(SECOND, content="b")])
    assert noted(store) == [(SECOND, True, True)]
    store.record(run.run_id, run.cascade_id, [reject(THIRD, ReasonCode.CORRUPT_PIXELS)])
    assert noted(store)[1:] == [(THIRD, True, False)]
    assert {row.path for row in store.results()} == {FIRST, SECOND, THIRD, "/in/other.dcm"}


def test_a_duplicate_that_is_read_before_the_first_is_noted_too(store: Store, run: Run) -> None:
    store.record(run.run_id, run.cascade_id, [scored_file(SECOND, content="b")])
    store.record(run.run_id, run.cascade_id, [scored_file(FIRST, content="a"), scored_file(THIRD, content="c")])
    assert noted(store) == [(SECOND, False, True), (THIRD, True, True)]


def test_a_file_that_cannot_be_read_just_now_is_noted_once_it_is(store: Store, run: Run) -> None:
    away = Outcome(found(SECOND), rejected=Retry(ReasonCode.UNREADABLE, "EIO."))
    store.record(run.run_id, run.cascade_id, [away])
    assert noted(store) == []
    store.record(run.run_id, run.cascade_id, [scored_file(SECOND, content="b")])
    assert noted(store) == [(SECOND, False, True)]
