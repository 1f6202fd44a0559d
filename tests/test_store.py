"""What the pipeline needs from the store, on SQLite and on Postgres."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.store import Run, Store, path_to_text, text_to_path
from cxrbatch.store.connection import connect
from cxrbatch.store.schema import audit, files, images, metadata, models, predictions, runs, scores
from cxrbatch.types import Decision, Outcome
from store_images import CASCADE, OTHER_CASCADE, begin, found, image, linked, prediction, reject, scored_file


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return begin(store)


def record(store: Store, run: Run, *outcomes: Outcome, **how: Any) -> Any:
    return store.record(run.run_id, run.cascade_id, outcomes, **how)


def rows(store: Store, table: sa.Table) -> list[dict[str, Any]]:
    with connect(store.engine) as connection:
        return [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]


def results(store: Store, **filters: Any) -> dict[str, Any]:
    return {row.path: row for row in store.results(**filters)}


def events(store: Store) -> list[tuple[str, str]]:
    return [(row["event"], row["path"]) for row in rows(store, audit)]


def test_a_run_knows_what_made_it(store: Store) -> None:
    one, two, other = begin(store), begin(store), begin(store, OTHER_CASCADE)
    assert one.cascade_id == two.cascade_id != other.cascade_id
    assert len({one.run_id, two.run_id, other.run_id}) == 3
    store.end_run(two.run_id, {"found": 3})
    kept = {row["id"]: row for row in rows(store, runs)}
    assert kept[one.run_id]["finished_at"] is None
    assert kept[two.run_id]["counts_json"] == '{"found": 3}'
    assert [row["stages"] for row in rows(store, models)] == ["gate,disease", "disease"]
    assert rows(store, models)[0]["manifest_sha256"] == CASCADE.manifest_sha256


def test_one_row_a_file_whatever_became_of_it(store: Store, run: Run) -> None:
    reported = record(
        store,
        run,
        scored_file("/d/1", "COVID19", 0.7, decision=Decision.NEEDS_REVIEW, review_reasons=("low_confidence", "x")),
        scored_file("/d/2", "NOT_CHEST", 0.98),
        reject("/d/3", ReasonCode.TRUNCATED),
        reject("/d/4", ReasonCode.UNREADABLE),
        Outcome(found("/d/5"), image("flat"), rejected=Rejected(ReasonCode.CONSTANT_IMAGE, "All one grey.")),
    )
    assert (reported.done, reported.rejected, reported.retry, reported.waiting) == (2, 2, 1, 0)
    row = results(store)
    assert list(row) == ["/d/1", "/d/2", "/d/3", "/d/4", "/d/5"]
    assert (row["/d/1"].label, row["/d/1"].confidence, row["/d/1"].decision) == ("COVID19", 0.7, "needs_review")
    assert row["/d/1"].prob_covid19 == 0.7
    assert row["/d/1"].prob_normal == row["/d/1"].prob_tuberculosis == pytest.approx(0.1)
    assert row["/d/1"].review_reasons == "low_confidence,x"
    assert row["/d/1"].cascade == "default 1.0.0"
    assert (row["/d/1"].rows, row["/d/1"].columns, row["/d/1"].is_chest) == (2048, 2500, True)
    assert (row["/d/1"].mtime, row["/d/1"].run_id) == ("2023-11-14 22:13:20", run.run_id)
    assert (row["/d/2"].label, row["/d/2"].is_chest, row["/d/2"].prob_normal) == ("NOT_CHEST", False, None)
    assert (row["/d/3"].state, row["/d/3"].reason_code, row["/d/3"].label) == ("rejected", "truncated", None)
    assert row["/d/3"].reason == "It is truncated."
    assert row["/d/4"].state == "retry"
    assert row["/d/5"].sha256 == image("flat").sha256
    assert all(r.processed_at is not None for r in row.values())


def test_the_same_batch_twice_changes_nothing(store: Store, run: Run) -> None:
    batch = [
        scored_file("/a", "COVID19", 0.8),
        scored_file("/b", content="/a"),
        reject("/c"),
        linked("/d", "/a"),
        linked("/e", "nobody scored this"),
    ]
    record(store, run, *batch)
    before = {table.name: rows(store, table) for table in metadata.sorted_tables}
    record(store, run, *batch)
    record(store, run, *reversed(batch))
    after = {table.name: rows(store, table) for table in metadata.sorted_tables}
    for row in before["files"] + after["files"]:
        row.pop("last_seen")
    assert after == before
    assert [row["state"] for row in after["files"]] == ["done", "done", "rejected", "done", "waiting"]


def test_the_same_content_is_scored_once_and_listed_twice(store: Store, run: Run) -> None:
    record(store, run, scored_file("/a", "PNEUMONIA"), scored_file("/x"))
    known = store.predicted([image("/a").sha256, image("/new").sha256], run.cascade_id)
    assert known == {image("/a").sha256}
    assert store.predicted([image("/a").sha256], begin(store, OTHER_CASCADE).cascade_id) == set()
    record(store, run, linked("/b", "/a"), scored_file("/c", "NORMAL", content="/a"))
    row = results(store)
    assert row["/b"].label == row["/c"].label == "PNEUMONIA"  # the first prediction stands
    assert row["/b"].prob_pneumonia == row["/a"].prob_pneumonia
    assert len(rows(store, images)) == len(rows(store, predictions)) == 2


def test_one_batch_may_hold_a_content_and_its_link_in_any_order(store: Store, run: Run) -> None:
    record(store, run, linked("/1", "same"), scored_file("/2", "COVID19", content="same"), linked("/3", "same"))
    assert [row.label for row in store.results()] == ["COVID19"] * 3


def test_a_path_that_comes_twice_in_a_batch_counts_once(store: Store, run: Run) -> None:
    record(store, run, reject("/a"), scored_file("/a", "COVID19"))
    assert [(row.path, row.label, row.reason_code) for row in store.results()] == [("/a", "COVID19", None)]


def test_changed_content_is_a_new_image_and_leaves_a_trace(store: Store, run: Run) -> None:
    record(store, run, scored_file("/a", "NORMAL", content="old"))
    record(store, run, scored_file("/a", "COVID19", content="new", size=1001))
    assert results(store)["/a"].label == "COVID19"
    assert len(rows(store, images)) == 2
    (entry,) = rows(store, audit)
    assert (entry["event"], entry["path"]) == ("image_changed", "/a")
    assert (entry["old"], entry["new"]) == (image("old").sha256, image("new").sha256)
    record(store, run, reject("/a", size=1002))  # then junk: its label goes, its history stays
    row = results(store)["/a"]
    assert (row.label, row.state, row.sha256, row.prob_covid19) == (None, "rejected", None, None)
    assert rows(store, audit)[1]["new"] is None
    record(store, run, reject("/a", ReasonCode.UNREADABLE, size=1002))
    assert len(rows(store, audit)) == 2


UNCHANGED = [found("/in/done"), found("/in/rejected"), found("/in/retry"), found("/in/new")]


def test_unchanged_files_need_nothing(store: Store, run: Run) -> None:
    record(store, run, scored_file("/in/done"), reject("/in/rejected"), reject("/in/retry", ReasonCode.VANISHED))
    ask: Callable[..., set[str]] = store.unchanged
    assert ask(UNCHANGED, run.cascade_id) == {"/in/done", "/in/rejected"}
    assert ask(UNCHANGED, run.cascade_id, "failed") == {"/in/done"}
    assert ask(UNCHANGED, run.cascade_id, "all") == set()
    assert ask([replace(UNCHANGED[0], inode=99)], run.cascade_id) == {"/in/done"}
    assert ask([replace(UNCHANGED[0], size=1)], run.cascade_id) == set()
    assert ask([replace(UNCHANGED[0], mtime_ns=1)], run.cascade_id) == set()
    assert ask([], run.cascade_id) == set()


def test_what_the_walk_found_is_settled_by_the_walk(store: Store, run: Run) -> None:
    fifo = Rejected(ReasonCode.NOT_A_REGULAR_FILE, "A FIFO.")
    record(store, run, Outcome(found("/fifo", problem=fifo), rejected=fifo), scored_file("/image"))
    assert store.unchanged([found("/fifo", problem=fifo)], run.cascade_id) == {"/fifo"}
    assert store.unchanged([found("/fifo")], run.cascade_id) == set()  # an image now, of the same size and mtime
    assert store.unchanged([found("/image", problem=fifo)], run.cascade_id) == set()


def test_a_rejection_by_one_cascade_is_not_one_by_another(store: Store, run: Run) -> None:
    nan = Rejected(ReasonCode.NON_FINITE_OUTPUT, "The network gave NaN.")
    record(store, run, Outcome(found("/nan"), image("nan"), rejected=nan), reject("/junk"))
    other = begin(store, OTHER_CASCADE)
    assert store.unchanged([found("/nan"), found("/junk")], run.cascade_id) == {"/nan", "/junk"}
    assert store.unchanged([found("/nan"), found("/junk")], other.cascade_id) == {"/junk"}


def test_the_view_shows_the_cascade_used_last(store: Store, run: Run) -> None:
    record(store, run, scored_file("/a", "NORMAL"), scored_file("/b", "NORMAL"))
    other = begin(store, OTHER_CASCADE)
    both = [found("/a"), found("/b")]
    assert store.unchanged(both, other.cascade_id) == set()
    record(store, other, scored_file("/a", "COVID19"), scored_file("/b", "COVID19"))
    assert {row.cascade for row in store.results()} == {"default 2.0.0"}
    # Back to the first: nothing to score, but its predictions are shown again.
    assert store.unchanged(both, run.cascade_id, look_only=True) == {"/a", "/b"}
    assert {row.label for row in store.results()} == {"COVID19"}
    assert store.unchanged(both, run.cascade_id) == {"/a", "/b"}
    assert {(row.label, row.cascade, row.prob_normal) for row in store.results()} == {("NORMAL", "default 1.0.0", 0.9)}
    assert len(rows(store, predictions)) == 4


def test_what_is_gone_is_missing_and_may_return(store: Store, run: Run) -> None:
    record(
        store, run, scored_file("/in/a"), reject("/in/b"), reject("/in/c", ReasonCode.VANISHED), scored_file("/other/d")
    )
    record(store, run, reject("/in", ReasonCode.UNREADABLE))  # it could not be listed then
    assert store.mark_missing(run.run_id, ["/in"], {"/in/a"}) == 3
    assert store.mark_missing(run.run_id, ["/in"], {"/in/a"}) == 0
    assert {path: row.state for path, row in results(store).items()} == {
        "/in": "missing",
        "/in/a": "done",
        "/in/b": "missing",
        "/in/c": "missing",
        "/other/d": "done",
    }
    assert store.mark_missing(run.run_id, ["/in/"], set()) == 1
    assert results(store)["/in/a"].label == "NORMAL"  # all that was known is kept
    back = [found("/in/a"), found("/in/b"), found("/in/c")]
    assert store.unchanged(back, run.cascade_id) == {"/in/a", "/in/b"}
    assert {path: row.state for path, row in results(store).items()} == {
        "/in": "missing",
        "/in/a": "done",
        "/in/b": "rejected",
        "/in/c": "missing",  # it will be tried, and then has an outcome
        "/other/d": "done",
    }
    record(store, run, scored_file("/in/c"))
    assert results(store)["/in/c"].state == "done"
    assert [event for event, path in events(store) if path == "/in/a"] == ["missing", "returned"]


def test_what_is_gone_is_looked_for_from_its_folder_on(store: Store, run: Run) -> None:
    def steps() -> int:
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        with store.engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
        dbapi.set_progress_handler(step, 1)
        assert store.mark_missing(run.run_id, ["/in"], {"/in/a"}) == 0
        dbapi.set_progress_handler(None, 1)
        return count

    if store.engine.dialect.name != "sqlite":
        pytest.skip("Postgres looks up the narrower of two bounds")
    record(store, run, reject("/in/a"))
    before = steps()
    record(store, run, *(reject(f"/a/{i}") for i in range(300)))
    assert steps() < before + 50


def test_reprocessing_replaces_only_when_asked_and_keeps_the_old_numbers(store: Store, run: Run) -> None:
    record(store, run, scored_file("/a", "NORMAL"), linked("/b", "/a"), scored_file("/same"))
    again = begin(store)
    better = scored_file("/a", "COVID19", 0.8, facts={"decoder": "made up 2"})
    record(store, again, better)
    assert results(store)["/a"].label == "NORMAL"
    record(store, again, better, scored_file("/same"), replace=True)
    for path in ("/a", "/b"):
        row = results(store)[path]
        assert (row.label, row.confidence, row.prob_covid19, row.decoder) == ("COVID19", 0.8, 0.8, "made up 2")
        assert row.run_id == again.run_id
    assert results(store)["/same"].run_id == run.run_id  # nothing new was said of it
    assert events(store) == [("rescored", "/a"), ("rescored", "/b")]
    assert '"label": "NORMAL"' in rows(store, audit)[0]["detail"]
    assert len(rows(store, scores)) == 8


ODD = [
    b"/d/new\nline",
    b'/d/it\'s "quoted"; DROP TABLE files;--',
    b"/d/=cmd|' /C calc'!A0",
    b"/d/\x1b[31mred\x1b[0m",
    b"/d/" + b"n" * 255,
    b"/d/" + b"\xff" * 255,
    b"/d/\xff\xfe not utf-8",
    b"/d/back\\slash",
    b"/d/\\xff",
    b"/d/%s %(a)s :b {c} ?",
    "/d/日本語 é e\u0301".encode(),
    b"/d/ " + b"long/" * 800,
]


def test_odd_names_come_back_and_are_found_again(store: Store, run: Run) -> None:
    paths = [os.fsdecode(name) for name in ODD]
    record(store, run, *(scored_file(path) for path in paths))
    assert store.unchanged([found(path) for path in paths], run.cascade_id) == set(paths)
    kept = [row.path for row in store.results()]
    assert sorted(kept) == sorted(path_to_text(path) for path in paths)
    short = [path for path in kept if len(path) < 2000]
    assert {text_to_path(path) for path in short} == set(paths[:-1])
    assert len(store.everything_about(paths[6])) == 1
    assert len(list(store.results(roots=["/d"]))) == len(paths)
    assert store.mark_missing(run.run_id, ["/d"], set()) == len(paths)


def test_a_folder_with_backslashes_is_told_from_its_escaped_twin(store: Store, run: Run) -> None:
    inside = [os.fsdecode(b"/a\\b/1"), os.fsdecode(b"/a\\b/\xff")]
    outside = [os.fsdecode(b"/a\\\\b/1"), os.fsdecode(b"/a\\\\b/\xff"), "/a", "/a0"]
    record(store, run, *(scored_file(path) for path in inside + outside))
    assert {text_to_path(row.path) for row in store.results(roots=["/a\\b"])} == set(inside)
    assert store.counts(["/a\\b"]).by_state == {"done": 2}
    assert store.mark_missing(run.run_id, ["/a\\b"], set()) == 2


def test_numbers_beyond_what_a_column_holds(store: Store, run: Run) -> None:
    far = scored_file(
        "/far", size=2**62, mtime_ns=2**64, inode=2**64 - 1
    )  # the year 2554; an inode of some FUSE mounts
    record(store, run, far, scored_file("/past", mtime_ns=-1))
    assert store.unchanged([far.file, found("/past", mtime_ns=-1)], run.cascade_id) == {"/far", "/past"}
    assert rows(store, files)[0]["inode"] == -1
    assert len(results(store)) == 2


def test_hostile_header_texts_are_kept_short_and_clean(store: Store, run: Run) -> None:
    facts = {"manufacturer": "A\0B" + "x" * 10_000, "modality": "\udcff", "sop_instance_uid": "1." * 5000}
    record(store, run, scored_file("/a", facts=facts))
    row = results(store)["/a"]
    assert row.manufacturer.startswith("A\ufffdBxxx")
    assert max(len(row.manufacturer), len(row.sop_instance_uid)) == 300
    assert row.modality == "\ufffd"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_never_becomes_a_row(store: Store, run: Run, bad: float) -> None:
    broken = replace(prediction(), logits={"NORMAL": bad})
    with pytest.raises(ValueError, match="not finite"):
        record(store, run, scored_file("/good"), Outcome(found("/bad"), image("bad"), broken))
    assert results(store) == {}  # the batch is kept whole or not at all


def test_counts_of_the_closing_table(store: Store, run: Run) -> None:
    record(
        store,
        run,
        scored_file("/a/1"),
        scored_file("/a/2", "COVID19"),
        reject("/a/3"),
        reject("/b/4"),
        scored_file("/ab/5", "COVID19"),
    )
    everywhere, below = store.counts(), store.counts(["/a"])
    assert everywhere.by_label == {"NORMAL": 1, "COVID19": 2}
    assert everywhere.by_reason == {"not_an_image": 2}
    assert everywhere.by_state == {"done": 3, "rejected": 2}
    assert below.by_label == {"NORMAL": 1, "COVID19": 1}
    assert (below.by_reason, below.by_decision) == ({"not_an_image": 1}, {"reported": 2})
    assert store.counts(["/a/3"]).by_state == {"rejected": 1}


def test_as_many_roots_as_a_shell_names(store: Store, run: Run) -> None:
    paths = [f"/a/{i:03}" for i in range(700)]
    record(store, run, scored_file(paths[0]), scored_file(paths[699], "COVID19"), reject(paths[350]), reject("/a/x"))
    assert store.note_mounts([*paths, "/m"], ["/m/disk"]) == {"/m/disk"}
    assert store.note_mounts([*paths, "/m"], []) == {"/m/disk"}
    counted = store.counts(paths)
    assert (counted.by_state, counted.by_reason) == ({"done": 2, "rejected": 1}, {"not_an_image": 1})
    assert [row.path for row in store.results(roots=paths)] == [paths[0], paths[350], paths[699]]


def test_an_empty_batch_is_no_trouble(store: Store, run: Run) -> None:
    assert record(store, run).done == 0
    assert store.predicted([], run.cascade_id) == set()
    assert store.counts().by_state == {}
