"""Reading: filters, everything about one image, and every query of docs/howto/sql.md on both stores."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cxrbatch.errors import ReasonCode
from cxrbatch.store import ReviewAction, Store
from cxrbatch.store.connection import connect
from cxrbatch.types import Decision
from store_images import OTHER_CASCADE, begin, found, image, linked, reject, review, scored_file

HOWTO = Path(__file__).parent.parent / "docs" / "howto" / "sql.md"
QUERIES = dict(re.findall(r"^## (.+?)\n.*?^```sql\n(.+?)^```", HOWTO.read_text(), flags=re.MULTILINE | re.DOTALL))
MONDAY = datetime(2026, 11, 16, 9, 30, tzinfo=UTC)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Rows of two days and two cascades, with one disagreement."""
    day = iter([MONDAY] * 2 + [MONDAY + timedelta(days=1)] * 20)
    with Store.open(store_url, clock=lambda: next(day)) as opened:
        run = begin(opened)
        monday = "/incoming/monday"
        opened.record(
            run.run_id,
            run.cascade_id,
            [
                scored_file(f"{monday}/image.dcm", "COVID19", 0.97),
                scored_file(f"{monday}/sure.png", "COVID19", 0.96, facts={"format": "png"}),
                scored_file(f"{monday}/unsure.dcm", "NORMAL", 0.5, decision=Decision.NEEDS_REVIEW),
                scored_file(f"{monday}/hip.dcm", "NOT_CHEST", 0.99),
                reject("/incoming/broken/image.dcm", ReasonCode.CORRUPT_PIXELS),
            ],
        )
        run = begin(opened, OTHER_CASCADE)
        later = [
            scored_file(f"{monday}/image.dcm", "PNEUMONIA", 0.8),
            linked("/incoming/copy.dcm", f"{monday}/image.dcm"),
        ]
        opened.record(run.run_id, run.cascade_id, later)
        (seen,) = opened.everything_about(f"{monday}/image.dcm")
        review(opened, seen.file["image_id"], "dr_a", ReviewAction.ACCEPT, shown_label="PNEUMONIA")
        review(opened, seen.file["image_id"], "dr_a", ReviewAction.WITHDRAW)
        review(opened, seen.file["image_id"], "dr_b", ReviewAction.OVERRIDE, "NORMAL", comment="motion")
        opened.record(run.run_id, run.cascade_id, [scored_file("/incoming/new.dcm", content="changed")])
        opened.record(run.run_id, run.cascade_id, [scored_file(f"{monday}/hip.dcm", content="other", size=2)])
        yield opened


def ask(store: Store, question: str) -> list[Any]:
    with connect(store.engine) as connection:
        return [tuple(row) for row in connection.exec_driver_sql(QUERIES[question].rstrip().rstrip(";"))]


def test_there_are_ten_queries_and_each_says_something(store: Store) -> None:
    assert len(QUERIES) >= 10
    for question, query in QUERIES.items():
        if store.engine.dialect.name == "sqlite" or not query.startswith("-- SQLite only"):
            assert ask(store, question), question


def test_the_queries_say_what_they_claim(store: Store) -> None:
    assert ask(store, "How many of each label?") == [("NORMAL", 3), ("PNEUMONIA", 2), ("COVID19", 1)]
    large = "How many of each label, in a large store?"
    assert ask(store, large) == ask(store, "How many of each label?")
    assert [row[0] for row in ask(store, "What should a person look at first?")] == ["/incoming/monday/unsure.dcm"]
    assert ask(store, "Why were files rejected?") == [("corrupt_pixels", 1, "/incoming/broken/image.dcm")]
    assert ask(store, "Why was this file rejected?")[0][3] == "It is corrupt_pixels."
    assert len(ask(store, "What lies in one folder?")) == 4
    assert [row[0] for row in ask(store, "Confident COVID-19")] == ["/incoming/monday/sure.png"]
    assert [row[1] for row in ask(store, "Which files hold the same image?")] == [2]
    disagreement = ask(store, "Where do readers and model disagree?")
    assert [row[1:5] for row in disagreement] == [("PNEUMONIA", 0.8, "NORMAL", "dr_b")] * 2
    assert ask(store, "How many files a day?") == [("2026-11-16", 3), ("2026-11-17", 4)]
    if store.engine.dialect.name == "sqlite":
        assert ask(store, "How many files a day, in a large store?") == ask(store, "How many files a day?")
    assert [row[:3] for row in ask(store, "Which images does a new cascade call differently?")] == [
        ("COVID19", "PNEUMONIA", 1)
    ]
    made = ask(store, "What made this row?")[0]
    assert made[6:9] == ("default", "2.0.0", OTHER_CASCADE.manifest_sha256)


def test_filters_hold_together(store: Store) -> None:
    def paths(**filters: Any) -> list[str]:
        return [row.path.removeprefix("/incoming/") for row in store.results(**filters)]

    assert paths(label="COVID19") == ["monday/sure.png"]
    assert paths(min_confidence=0.9) == ["monday/hip.dcm", "monday/sure.png", "new.dcm"]
    assert paths(min_confidence=0.9, label="NORMAL") == ["monday/hip.dcm", "new.dcm"]
    assert paths(decision=Decision.NEEDS_REVIEW) == ["monday/unsure.dcm"]
    assert paths(state="rejected") == paths(reason_code="corrupt_pixels") == ["broken/image.dcm"]
    assert paths(since=MONDAY + timedelta(seconds=1)) == [
        "copy.dcm",
        "monday/hip.dcm",
        "monday/image.dcm",
        "new.dcm",
    ]
    assert paths(roots=["/incoming/monday/", "/incoming/new.dcm"], limit=2) == ["monday/hip.dcm", "monday/image.dcm"]
    assert paths(roots=["/incoming/mon"]) == []
    assert len(paths()) == 7


def test_the_first_rows_of_a_filter_by_confidence(store: Store) -> None:
    def confidences(**filters: Any) -> list[float]:
        return [row.confidence for row in store.results(label="NORMAL", **filters)]

    every = sorted(confidences())
    assert len(set(every)) > 1
    assert confidences(order="least sure", limit=2) == every[:2]
    assert confidences(order="surest", limit=2) == every[::-1][:2]
    assert confidences(order="surest", min_confidence=0.95) == [c for c in every[::-1] if c >= 0.95]


def test_the_newest_rows(store: Store) -> None:
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [scored_file("/incoming/zebra.dcm", "NORMAL")])
    every = [row.processed_at for row in store.results(since=MONDAY)]
    newest = list(store.results(since=MONDAY, order="newest", limit=6))
    assert [row.processed_at for row in newest] == sorted(every, reverse=True)[:6]
    assert len({row.processed_at for row in newest}) == 2
    assert [row.path for row in newest[:5]] == sorted(row.path for row in newest[:5])


def test_times_are_the_same_on_both_stores(store: Store) -> None:
    row = next(iter(store.results(label="COVID19")))
    assert row.processed_at == MONDAY
    assert row.processed_at.tzinfo is not None


def test_everything_about_one_image(store: Store) -> None:
    (scored_file,) = store.everything_about("/incoming/monday/image.dcm")
    assert scored_file.result["label"] == "PNEUMONIA"
    assert scored_file.image is not None
    assert scored_file.image["format"] == "dicom"
    assert scored_file.same_image == ["/incoming/copy.dcm"]
    newest, first = scored_file.predictions
    assert (newest.prediction["label"], first.prediction["label"]) == ("PNEUMONIA", "COVID19")
    assert [review["reviewer"] for review in scored_file.reviews] == ["dr_a", "dr_a", "dr_b"]
    assert first.cascade["version"] == "1.0.0"
    assert first.run["engine"] == "torch"
    assert {score["label"]: score["probability"] for score in first.scores}["COVID19"] == 0.97
    assert [entry["event"] for entry in store.everything_about("/incoming/monday/hip.dcm")[0].history] == [
        "image_changed"
    ]


def test_everything_about_a_content(store: Store) -> None:
    digest = image("/incoming/monday/image.dcm").sha256
    for digits in (digest, digest[:8], digest.upper()):
        both = [scored_file.file["path"] for scored_file in store.everything_about(digits)]
        assert both == ["/incoming/copy.dcm", "/incoming/monday/image.dcm"]
    assert store.everything_about("f" * 64) == store.everything_about("/nowhere") == []


def test_two_files_without_an_image_have_nothing_in_common(store: Store) -> None:
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [reject("/incoming/broken/empty.dcm", ReasonCode.EMPTY_FILE)])
    (rejected,) = store.everything_about("/incoming/broken/image.dcm")
    assert rejected.image is None
    assert rejected.same_image == []


def test_digits_that_begin_two_contents_are_asked_back(store: Store) -> None:
    run = begin(store)
    twins = [scored_file(f"/twin/{i}") for i in range(2)]
    shas = ("abcdef" + "0" * 58, "abcdef" + "1" * 58)
    for twin, sha in zip(twins, shas, strict=True):
        object.__setattr__(twin.image, "sha256", sha)
    store.record(run.run_id, run.cascade_id, twins)
    with pytest.raises(ValueError, match="more digits"):
        store.everything_about("abcdef")
    assert len(store.everything_about(shas[0][:7])) == 1


def test_a_stream_that_is_left_early_harms_nothing(store: Store) -> None:
    rows = store.results()
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [scored_file("/after")])
    assert store.unchanged([found("/after")], run.cascade_id) == {"/after"}
