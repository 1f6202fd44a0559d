"""SQLite's query plans: by index, for any size of the store.

SQLite plans without statistics, so an empty store has the plans of one with a million rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.types import Decision
from store_images import begin, found, image, linked, reject, scored_file
from test_store_queries import QUERIES

#: These read a whole index and nothing else; every other statement uses look-ups.
COUNTING = {
    "How many of each label?": "ix_files_state_label_decision",
    "How many files a day?": "ix_files_processed_at",
    "How many of each label, in a large store?": "ix_files_state_label_decision (state=? AND label=?)",
    "How many files a day, in a large store?": "ix_files_processed_at (processed_at>? AND processed_at<?)",
}
#: Small tables, or few rows (people make reviews; the index on copies holds only copies).
MAY_SCAN = r"models|runs|labels|days|v\b|anon_\d+ VIRTUAL|d\b|seconds|\(subquery|files USING INDEX ix_files_copies$"
SELECTIVE = r"\([^)]*\b(path|sha256|rowid|image_id|prediction_id|id|manifest_sha256)[=>]"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path / 's.db'}") as opened:
        yield opened


def plan(store: Store, statement: str, values: Any = ()) -> list[str]:
    with connect(store.engine) as connection:
        return [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]


def scans(steps: list[str]) -> list[str]:
    return [step for step in steps if re.match(rf"SCAN (?!{MAY_SCAN})", step)]


@pytest.mark.parametrize("question", QUERIES)
def test_the_queries_of_the_how_to_use_indexes(store: Store, question: str) -> None:
    steps = plan(store, QUERIES[question])
    assert scans(steps) == []
    if question in COUNTING:
        assert any(f"COVERING INDEX {COUNTING[question]}" in step for step in steps)


def test_labels_are_counted_through_the_view_without_a_row_of_files(store: Store) -> None:
    steps = plan(store, "SELECT label, count(*) FROM results GROUP BY label")
    assert len(steps) == 1 and steps[0].startswith("SCAN f USING COVERING INDEX ix_files_label_"), "and nothing else"


#: The filters of `cxrbatch results`, and the index that finds the rows of each.
FILTERS: list[tuple[dict[str, Any], str]] = [
    ({"label": "COVID19"}, "ix_files_label_"),
    ({"label": "COVID19", "min_confidence": 0.99}, "ix_files_label_confidence (label=? AND confidence>?)"),
    ({"decision": Decision.NEEDS_REVIEW}, "ix_files_decision_confidence (decision=?)"),
    (
        {"decision": Decision.NEEDS_REVIEW, "order": "least sure", "limit": 200},
        "ix_files_decision_confidence (decision=?)",
    ),
    ({"label": "COVID19", "order": "surest", "limit": 200}, "ix_files_label_confidence (label=?)"),
    ({"since": datetime(2026, 11, 1, tzinfo=UTC)}, "ix_files_processed_at (processed_at>?)"),
    (
        {"since": datetime(2026, 11, 1, tzinfo=UTC), "order": "newest", "limit": 200},
        "ix_files_processed_at (processed_at>?)",
    ),
    ({"roots": ["/images/monday"]}, "SEARCH f USING INDEX sqlite_autoindex_files_1 (path>? AND path<?)"),
    ({"limit": 200}, "SCAN f USING INDEX sqlite_autoindex_files_1"),
    ({"min_confidence": 0.99, "limit": 200}, "SCAN f USING INDEX sqlite_autoindex_files_1"),
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda given: "-".join(given[0]))
def test_each_filter_of_results_is_served_by_an_index(store: Store, filters: tuple[dict[str, Any], str]) -> None:
    said: list[tuple[str, Any]] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda c, cur, text, values, *_: said.append((text, values)))
    list(store.results(**filters[0]))
    steps = plan(store, *said[-1])  # the first is BEGIN
    assert filters[1] in " | ".join(steps), steps
    if "order" not in filters[0]:  # else two hundred rows are sorted
        assert not [step for step in steps if "FOR ORDER BY" in step], "the rows come sorted as they are found"
    else:
        assert sum("FOR ORDER BY" in step for step in steps) == 1, "the rows, not what they are chosen from"


def test_a_uid_or_a_sha256_is_looked_up_through_the_view(store: Store) -> None:
    for column in ("sha256", "study_instance_uid", "sop_instance_uid"):
        assert scans(plan(store, f"SELECT path, label FROM results WHERE {column} = 'x'")) == []


@pytest.mark.parametrize(
    "act",
    [
        lambda store, run: store.unchanged([found("/a")], run.cascade_id),
        lambda store, run: store.predicted([image("/a").sha256], run.cascade_id),
        lambda store, run: store.record(
            run.run_id,
            run.cascade_id,
            [scored_file("/a"), scored_file("/b", content="/a"), linked("/c", "/a"), reject("/d")],
        ),
        lambda store, run: store.record(run.run_id, run.cascade_id, [scored_file("/a", "COVID19")], replace=True),
        lambda store, run: store.mark_missing(run.run_id, ["/"], set()),
        lambda store, run: store.everything_about("/a") + store.everything_about(image("/a").sha256),
        lambda store, run: list(store.results(roots=["/x"])),
        lambda store, run: store.counts([f"/x/{i}" for i in range(201)]),
    ],
    ids=["unchanged", "predicted", "record", "replace", "mark_missing", "everything_about", "results", "counts"],
)
def test_the_statements_of_the_pipeline_look_up_what_they_name(store: Store, act: Callable[[Store, Any], Any]) -> None:
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [scored_file("/a")])
    said: list[tuple[str, Any]] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda c, cur, text, values, *_: said.append((text, values)))
    act(store, run)
    statements = [(text, values) for text, values in said if re.match("SELECT|UPDATE|DELETE", text)]
    assert statements
    for text, values in statements:
        row = values[0] if isinstance(values, list) else values
        steps = plan(store, text, row)
        assert scans(steps) == [], text
        # Not by a cascade, state or label either: a million rows share one.
        searches = [step for step in steps if step.startswith("SEARCH")]
        assert [step for step in searches if not re.search(SELECTIVE, step)] == [], text
