"""The mark on copies finds the same contents with several paths as a look at every row."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime

import pytest

from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.store.housekeeping import check, prune
from cxrbatch.store.recording import write_outcomes
from store_images import OTHER_CASCADE, begin, linked, reject, scored_file
from test_store_queries import ask

ALL_ROWS = """
SELECT i.sha256, count(*) AS copies, min(f.path) AS one_of_them
FROM files f JOIN images i ON i.id = f.image_id GROUP BY i.sha256 HAVING count(*) > 1
"""


def by_all_rows(store: Store) -> set[tuple[object, ...]]:
    with connect(store.engine) as connection:
        return {tuple(row) for row in connection.exec_driver_sql(ALL_ROWS)}


def by_the_mark(store: Store) -> set[tuple[object, ...]]:
    return set(ask(store, "Which files hold the same image?"))


def marked(store: Store) -> list[str]:
    with connect(store.engine) as connection:
        return list(connection.exec_driver_sql("SELECT path FROM files WHERE is_copy ORDER BY path").scalars())


def test_whatever_happens_to_paths_and_contents_no_copy_is_overlooked(store_url: str) -> None:
    chance, size, most = random.Random(11), 1000, 0
    with Store.open(store_url) as store:
        cascades = [begin(store), begin(store, OTHER_CASCADE)]
        for _ in range(80):
            run = chance.choice(cascades)
            outcomes = []
            for path in chance.sample([f"/{i}" for i in range(14)], chance.choice((1, 1, 2, 5))):
                size, content = size + 1, f"content {chance.randrange(9)}"
                kinds = (scored_file(path, content=content, size=size), linked(path, content), reject(path, size=size))
                outcomes.append(chance.choice((*kinds, *kinds[:2])))
            store.record(run.run_id, run.cascade_id, outcomes, replace=chance.random() < 0.1)
            if chance.random() < 0.2:
                store.mark_missing(run.run_id, ["/"], {f"/{i}" for i in range(14) if chance.random() < 0.8})
            if chance.random() < 0.1:
                prune(store, 0, really=True)
            assert by_the_mark(store) == by_all_rows(store)
            most = max(most, len(by_all_rows(store)))
    assert most >= 3
    assert check(store_url) == []


def test_only_what_comes_second_is_marked(store_url: str) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        for _ in range(2):  # the second time with the same bytes: no path becomes a copy of itself
            store.record(run.run_id, run.cascade_id, [scored_file("/a"), scored_file("/b"), linked("/c", "/a")])
            store.record(run.run_id, run.cascade_id, [scored_file("/d")])
            assert marked(store) == ["/c"]
        other = begin(store, OTHER_CASCADE)
        store.record(other.run_id, other.cascade_id, [scored_file("/a"), scored_file("/b"), scored_file("/d")])
        assert marked(store) == ["/c"], "a second cascade reads the same bytes"
        store.record(run.run_id, run.cascade_id, [scored_file("/c", content="changed", size=2)])
        assert marked(store) == []


@pytest.mark.parametrize("known", [False, True], ids=["new content", "a content that no path holds any more"])
def test_two_that_record_one_content_at_once(store_url: str, known: bool) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        if known:
            store.record(run.run_id, run.cascade_id, [scored_file("/was", content="same")])
            store.record(run.run_id, run.cascade_id, [scored_file("/was", content="other", size=2)])
        second = threading.Thread(
            target=store.record, args=(run.run_id, run.cascade_id, [scored_file("/2", content="same")]), daemon=True
        )
        with connect(store.engine, write=True) as connection:
            first = [scored_file("/1", content="same")]
            write_outcomes(connection, run.run_id, run.cascade_id, first, datetime.now(UTC))
            second.start()
            time.sleep(0.2)  # long enough to wait for us, or to be through
        second.join(60)
        assert len(by_all_rows(store)) == 1
        assert by_the_mark(store) == by_all_rows(store)


def test_check_finds_copies_without_a_mark(store_url: str) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/a"), linked("/b", "/a"), scored_file("/c")])
        assert check(store_url) == []
        with connect(store.engine, write=True) as connection:
            connection.exec_driver_sql("UPDATE files SET is_copy = FALSE")
    assert check(store_url) == ["1 contents have several paths, and none of them is marked as a copy."]
