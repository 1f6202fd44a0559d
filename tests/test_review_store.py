"""What readers say, as the store keeps it: acts, current reads, final labels, work lists, rounds, users."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cxrbatch.errors import Fatal
from cxrbatch.review.report import lines_of
from cxrbatch.store import Act, ReviewAction, Store, record_act
from cxrbatch.store.connection import connect
from cxrbatch.store.report_data import blinded_labels, read_rows
from cxrbatch.store.review_images import in_round, is_hidden, take_lease
from cxrbatch.store.review_schema import Role, reads, reviews, sessions
from cxrbatch.store.reviews import current_reads, status_of
from cxrbatch.store.rounds import (
    NewRound,
    assignment,
    close_round,
    create_round,
    disputed_images,
    first_unread,
    progress_of,
)
from cxrbatch.store.users import (
    add_user,
    blocked_for_s,
    close_session,
    count_failure,
    forget_failures,
    open_session,
    session_of,
    set_disabled,
    set_password_hash,
)
from cxrbatch.store.work_list import Filters, candidates, count, page, rows_of
from cxrbatch.types import Decision
from store_images import LABELS, OTHER_CASCADE, begin, review, scored_file

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
IMAGES = 12


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[Store]:
    """Twelve images (ids 1 to 12), the first the least certain; the last two reported; image 1 under two names."""
    with Store.open(store_url, clock=clock) as opened:
        run = begin(opened)
        for number in range(IMAGES):
            decision = Decision.NEEDS_REVIEW if number < 10 else Decision.REPORTED
            outcome = scored_file(f"/in/{number:02}.png", LABELS[number % 4], 0.3 + number / 20, decision=decision)
            opened.record(run.run_id, run.cascade_id, [outcome])
        opened.record(run.run_id, run.cascade_id, [scored_file("/in/copy.png", content="/in/00.png")])
        yield opened


def status(store: Store, image_id: int) -> tuple[str, str | None] | None:
    with connect(store.engine) as connection:
        row = status_of(connection, image_id)
    return None if row is None else (row.status, row.label)


def listed(store: Store, viewer: str = "dr_a", **filters: Any) -> list[int]:
    with connect(store.engine) as connection:
        found = page(connection, Filters(**filters), viewer, 50)
        return [row.image_id for row in rows_of(connection, found.file_ids)]


def test_one_act_is_one_row_however_often_it_comes(store: Store) -> None:
    first = review(store, 1, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL", act_id="the-same-act")
    again = review(store, 1, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL", act_id="the-same-act")
    assert (first.again, again.again) == (False, True)
    assert first.review_id == again.review_id
    with connect(store.engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(reviews)).scalar_one() == 1


def test_undo_is_a_row_and_the_image_is_unreviewed_again(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.OVERRIDE, "COVID19")
    assert status(store, 1) == ("agreed", "COVID19")
    review(store, 1, "dr_a", ReviewAction.WITHDRAW)
    assert status(store, 1) is None
    with connect(store.engine) as connection:
        assert current_reads(connection, 1) == []
        assert connection.execute(sa.select(sa.func.count()).select_from(reviews)).scalar_one() == 2


def test_the_final_label_is_what_readers_agree_on_or_what_one_adjudicates(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL")
    seen = review(store, 1, "dr_b", ReviewAction.OVERRIDE, "COVID19")
    assert (seen.status, seen.label, seen.others) == ("disputed", None, ("dr_a",))
    review(store, 1, "chief", ReviewAction.OVERRIDE, "COVID19", adjudication=True)
    assert status(store, 1) == ("adjudicated", "COVID19")
    rows = {row.path: (row.review_label, row.review_status, row.reviewed_by) for row in store.results()}
    assert rows["/in/00.png"] == rows["/in/copy.png"] == ("COVID19", "adjudicated", "chief")
    assert rows["/in/01.png"] == (None, None, None)
    review(store, 1, "chief", ReviewAction.WITHDRAW, adjudication=True)
    assert status(store, 1) == ("disputed", None)
    review(store, 1, "dr_b", ReviewAction.OVERRIDE, "NORMAL")
    assert status(store, 1) == ("agreed", "NORMAL")


def test_a_flag_waits_for_another_reader_and_a_skip_says_nothing(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.FLAG)
    assert status(store, 1) == ("flagged", None)
    review(store, 2, "dr_a", ReviewAction.SKIP)
    assert status(store, 2) is None


def test_a_skip_takes_no_read_back_and_a_read_no_adjudication(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL")
    review(store, 1, "dr_a", ReviewAction.SKIP)
    assert status(store, 1) == ("agreed", "NORMAL")
    review(store, 1, "dr_b", ReviewAction.OVERRIDE, "COVID19")
    review(store, 1, "chief", ReviewAction.OVERRIDE, "COVID19", adjudication=True)
    review(store, 1, "chief", ReviewAction.SKIP)
    review(store, 1, "chief", ReviewAction.ACCEPT, shown_label="NORMAL")
    assert status(store, 1) == ("adjudicated", "COVID19")


def test_figures_of_blinded_reads_do_not_follow_what_a_reader_says_with_the_answer_in_view(store: Store) -> None:
    made = make_round(store, readers=("dr_a",), reads_per_image=1, size=4)
    items = sorted({image_id for image_id, _ in order_of(store, made, "dr_a")})
    for image_id in items:
        review(store, image_id, "dr_a", ReviewAction.OVERRIDE, "PNEUMONIA", blinded=True, round_id=made)
        review(store, image_id, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL")
    with connect(store.engine) as connection:
        assert blinded_labels(connection) == dict.fromkeys(items, "PNEUMONIA")
        lines = lines_of(read_rows(connection, made), read_rows(connection, None))
    assert {line.name for line in lines if line.figure.number and "sensitivity" in line.section} == {"PNEUMONIA"}
    bias = {line.name: line.figure.number for line in lines if line.section.startswith("Reader says")}
    assert bias == {"model shown": len(items), "blinded": len(items)}


def test_who_came_in_before_there_were_users_is_out_when_there_are(store: Store) -> None:
    session = open_session(store, "root", Role.ADMIN)
    add_user(store, "dr_a", "hash", Role.READER)
    known = open_session(store, "dr_a", Role.READER)
    add_user(store, "dr_b", "hash", Role.READER)
    assert session_of(store, session.token) is None
    assert session_of(store, known.token) is not None


@pytest.mark.parametrize("action", [ReviewAction.ACCEPT, ReviewAction.OVERRIDE])
def test_an_act_that_says_nothing_is_refused(store: Store, action: ReviewAction) -> None:
    with pytest.raises(Fatal, match="label"):
        review(store, 1, "dr_a", action)
    with pytest.raises(Fatal, match="no such image"):
        review(store, 999, "dr_a", ReviewAction.SKIP)


def test_two_readers_at_once_are_two_rows_and_a_dispute(store: Store) -> None:
    gate = threading.Barrier(2)

    def read(name: str, label: str) -> None:
        gate.wait()
        review(store, 3, name, ReviewAction.OVERRIDE, label)

    both = [threading.Thread(target=read, args=pair) for pair in (("dr_a", "NORMAL"), ("dr_b", "COVID19"))]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert status(store, 3) == ("disputed", None)


def test_a_review_names_what_was_shown_whatever_comes_later(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.ACCEPT, shown_label="NORMAL", shown_confidence=0.3, shown_cascade_id=1)
    run = begin(store, OTHER_CASCADE)
    store.record(run.run_id, run.cascade_id, [scored_file("/in/00.png", "TUBERCULOSIS", 0.9)])
    run = begin(store)
    store.record(run.run_id, run.cascade_id, [scored_file("/in/00.png", "COVID19", 0.8)], replace=True)
    with connect(store.engine) as connection:
        row = connection.execute(sa.select(reviews)).one()
    assert (row.image_id, row.shown_label, row.shown_confidence, row.shown_cascade_id) == (1, "NORMAL", 0.3, 1)
    assert listed(store, disagreement=True) == [1]


def test_a_blinded_act_keeps_nothing_of_the_model(store: Store) -> None:
    act = Act("blinded-act", 1, "dr_a", ReviewAction.OVERRIDE, "NORMAL", shown_label="COVID19", blinded=True)
    record_act(store, act)
    with connect(store.engine) as connection:
        assert connection.execute(sa.select(reviews.c.shown_label)).scalar_one() is None


def test_the_work_list_has_one_row_an_image_least_certain_first(store: Store) -> None:
    assert listed(store) == list(range(1, 13))
    assert listed(store, sort="certain") == list(range(12, 0, -1))
    assert sorted(listed(store, sort="newest")) == list(range(1, 13))
    assert listed(store, decision="reported") == [11, 12]


def test_every_filter_holds(store: Store) -> None:
    review(store, 1, "dr_a", ReviewAction.OVERRIDE, "COVID19")
    review(store, 2, "dr_b", ReviewAction.ACCEPT, shown_label=LABELS[1])
    assert listed(store, reviewed="no") == list(range(3, 13))
    assert listed(store, reviewed="yes") == [1, 2]
    assert listed(store, reviewed="mine") == [1]
    assert listed(store, reviewed="not_mine") == list(range(2, 13))
    assert listed(store, reader="dr_b") == [2]
    assert listed(store, disagreement=True) == [1]
    assert listed(store, reviewed="agreed", label="NORMAL") == [1]
    assert listed(store, label="COVID19") == [2, 6, 10]
    assert listed(store, min_confidence=0.39, max_confidence=0.51) == [3, 4, 5]
    assert listed(store, folder="/in") == list(range(1, 13))
    assert listed(store, folder="/elsewhere") == []
    assert listed(store, since=NOW + timedelta(days=1)) == []
    assert listed(store, until=NOW + timedelta(days=1)) == list(range(1, 13))
    assert (
        listed(store, flag="saturated") == listed(store, reason="low_confidence") == listed(store, label_set="x") == []
    )


@pytest.mark.parametrize("sort", ["uncertain", "certain", "newest"])
@pytest.mark.parametrize(
    "more", [{}, {"label": "NORMAL"}, {"decision": "needs_review"}], ids=["all", "label", "decision"]
)
def test_pages_come_one_after_another_and_back(store: Store, sort: Any, more: dict[str, str]) -> None:
    filters = Filters(sort=sort, **more)
    with connect(store.engine) as connection:
        whole = page(connection, filters, "dr_a", 50).file_ids
        forward: list[int] = []
        pages, place = [], None
        while True:
            found = page(connection, filters, "dr_a", 2, after=place)
            forward += found.file_ids
            pages.append(found)
            if not found.more_after:
                break
            place = found.last
        assert forward == whole
        last = pages[-1]
        before = page(connection, filters, "dr_a", 2, before=last.first)
        assert before.file_ids == pages[-2].file_ids
        assert count(connection, filters, "dr_a") == len(whole)
        assert count(connection, filters, "dr_a", cap=1) == 1


def make_round(store: Store, **more: Any) -> int:
    values: dict[str, Any] = {"name": "first", "readers": ("dr_a", "dr_b"), "filters": Filters(decision="needs_review")}
    return create_round(store, NewRound(**(values | {"filter_json": "{}", "size": 6, "seed": 7} | more)), "chief")


def order_of(store: Store, round_id: int, reader: str) -> list[tuple[int, int]]:
    found = []
    with connect(store.engine) as connection:
        position = 1
        while (item := assignment(connection, round_id, reader, position)) is not None:
            found.append((item.image_id, item.repeat))
            position += 1
    return found


def test_a_round_comes_from_its_seed(store: Store) -> None:
    first, second = make_round(store), make_round(store, name="second")
    other = make_round(store, name="third", seed=8)
    orders = {number: order_of(store, number, "dr_a") for number in (first, second, other)}
    assert orders[first] == orders[second] != orders[other]
    assert sorted(orders[first]) == sorted(order_of(store, first, "dr_b")) != order_of(store, first, "dr_b")


def test_a_stratified_round_has_as_many_of_each_label(store: Store) -> None:
    number = make_round(store, size=8, stratified=True)
    with connect(store.engine) as connection:
        labels = dict(candidates(connection, Filters()))
        chosen = [labels[image_id] for image_id in range(1, 13) if in_round(connection, number, image_id)]
    assert sorted(chosen) == sorted(LABELS * 2)


def test_hidden_repeats_come_later_to_the_same_reader(store: Store) -> None:
    number = make_round(store, size=10, repeat_share=0.3, readers=("dr_a", "dr_b", "dr_c"), reads_per_image=2)
    for reader in ("dr_a", "dr_b", "dr_c"):
        order = order_of(store, number, reader)
        repeats = [item for item in order if item[1]]
        for image_id, _ in repeats:
            assert order.index((image_id, 1)) > order.index((image_id, 0))
    assert sum(item[1] for reader in ("dr_a", "dr_b", "dr_c") for item in order_of(store, number, reader)) == 6


def test_a_blinded_round_hides_its_images_from_its_readers_until_it_is_closed(store: Store) -> None:
    number = make_round(store)
    inside = {image_id for image_id, _ in order_of(store, number, "dr_a")}
    assert set(listed(store, "dr_a")) == set(range(1, 13)) - inside
    assert set(listed(store, "chief")) == set(range(1, 13))
    with connect(store.engine) as connection:
        assert count(connection, Filters(), "dr_a") == 6
        assert all(is_hidden(connection, "dr_a", image_id) for image_id in inside)
    close_round(store, number)
    assert listed(store, "dr_a") == list(range(1, 13))


def test_progress_skips_and_disputes_of_a_round(store: Store) -> None:
    number = make_round(store, size=3)
    order = order_of(store, number, "dr_a")
    blinded = {"blinded": True, "round_id": number}
    with connect(store.engine) as connection:
        assert first_unread(connection, number, "dr_a") == 1
    review(store, order[0][0], "dr_a", ReviewAction.SKIP, **blinded)
    review(store, order[1][0], "dr_a", ReviewAction.OVERRIDE, "NORMAL", **blinded)
    review(store, order[1][0], "dr_b", ReviewAction.OVERRIDE, "COVID19", **blinded)
    with connect(store.engine) as connection:
        assert first_unread(connection, number, "dr_a", after=2) == 3
        a, b = progress_of(connection, number)
        assert (a.done, a.skipped, a.total, b.done, b.total) == (1, 1, 3, 1, 3)
        assert disputed_images(connection, number) == [order[1][0]]
    review(store, order[2][0], "dr_a", ReviewAction.OVERRIDE, "NORMAL", **blinded)
    with connect(store.engine) as connection:
        assert first_unread(connection, number, "dr_a") == 1, "what was skipped comes at the end"
    review(store, order[0][0], "dr_a", ReviewAction.OVERRIDE, "NORMAL", **blinded)
    with connect(store.engine) as connection:
        assert first_unread(connection, number, "dr_a") is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"readers": ("dr_a",)}, "as many readers"),
        ({"name": " "}, "needs a name"),
        ({"reads_per_image": 4}, "1 to 3"),
        ({"filters": Filters(label="NOTHING")}, "No image"),
    ],
)
def test_an_impossible_round_is_a_sentence(store: Store, more: dict[str, Any], why: str) -> None:
    with pytest.raises(Fatal, match=why):
        make_round(store, **more)
    make_round(store)
    with pytest.raises(Fatal, match="already"):
        make_round(store)


def test_a_lease_informs_and_expires_by_the_clock_of_the_store(store: Store, clock: Clock) -> None:
    def take(reader: str) -> str:
        with connect(store.engine, write=True) as connection:
            return take_lease(connection, store, 1, reader)

    assert take("dr_a") == ""
    assert take("dr_b") == "dr_a", "it never blocks"
    assert take("dr_b") == ""
    clock.now += timedelta(minutes=6)
    assert take("dr_a") == ""


def test_sessions_expire_and_can_be_revoked(store: Store, clock: Clock) -> None:
    add_user(store, "dr_a", "hash", Role.READER)
    with pytest.raises(Fatal, match="already"):
        add_user(store, "dr_a", "hash", Role.READER)
    one, two, three = (open_session(store, "dr_a", Role.READER) for _ in range(3))
    with connect(store.engine) as connection:
        assert one.token not in set(connection.execute(sa.select(sessions.c.token_sha256)).scalars())
    close_session(store, one.token)
    assert session_of(store, one.token) is None
    assert session_of(store, two.token) == two
    assert session_of(store, "x" * 43) is None
    clock.now += timedelta(hours=13)
    assert session_of(store, two.token) is None
    four = open_session(store, "dr_a", Role.READER)
    set_password_hash(store, "dr_a", "another")
    assert session_of(store, four.token) is None
    set_disabled(store, "dr_a", True)
    with pytest.raises(Fatal, match="no user"):
        set_disabled(store, "nobody", True)
    assert session_of(store, three.token) is None


def test_failed_logins_are_slowed_down_across_restarts(store: Store, clock: Clock, store_url: str) -> None:
    for _ in range(4):
        count_failure(store, ["user dr_a"])
    assert blocked_for_s(store, ["user dr_a"]) == 0
    count_failure(store, ["user dr_a"])
    waits = []
    for _ in range(12):
        with Store.open(store_url, clock=clock) as again:
            waits.append(blocked_for_s(again, ["user dr_a", "address 1.2.3.4"]))
        clock.now += timedelta(seconds=waits[-1])
        count_failure(store, ["user dr_a"])
    assert waits[:4] == [2, 4, 8, 16]
    assert waits[-1] == 900
    forget_failures(store, "user dr_a")
    assert blocked_for_s(store, ["user dr_a"]) == 0


def test_what_was_reviewed_or_is_in_a_round_is_never_pruned(store: Store) -> None:
    from cxrbatch.store.housekeeping import prune

    review(store, 11, "dr_a", ReviewAction.SKIP)
    make_round(store, size=3)
    store.mark_missing(1, ["/in"], set())
    pruned = prune(store, 0, really=True, now=NOW + timedelta(days=1))
    assert (pruned.files, pruned.images) == (13, 12 - 3 - 1)
    with connect(store.engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(reads)).scalar_one() == 1


def test_a_folder_holds_its_copies_and_an_image_is_one_row(store: Store) -> None:
    run = begin(store)

    def record(path: str, content: str) -> None:
        store.record(run.run_id, run.cascade_id, [scored_file(path, content=content)])

    for path in ("/B/00.png", "/B/again.png"):
        record(path, "/in/00.png")
    assert listed(store, folder="/in") == list(range(1, 13)) and listed(store) == list(range(1, 13))
    made = make_round(store, filters=Filters(folder="/B"), readers=("dr_a",), reads_per_image=1, size=9)
    assert [image_id for image_id, _ in order_of(store, made, "dr_a")] == [1]
    assert listed(store, "dr_b", folder="/B") == [1]
    with connect(store.engine) as connection:
        assert count(connection, Filters(folder="/B"), "dr_b") == 1
        assert [
            row.path for row in rows_of(connection, page(connection, Filters(folder="/B"), "dr_b", 9).file_ids)
        ] == ["/B/00.png"]
    record("/in/02.png", "/in/03.png")  # overwritten: a copy that was there before the other one
    assert sorted(listed(store, "dr_b")) == [1, 2, *range(4, 13)]


@pytest.mark.parametrize(
    "filters",
    [
        Filters(),
        Filters(decision="needs_review", reviewed="no"),
        Filters(reviewed="not_mine"),
        Filters(reviewed="disputed"),
        Filters(reader="dr_a"),
        Filters(disagreement=True),
        Filters(label="COVID19"),
        Filters(sort="newest"),
        Filters(folder="/in"),
    ],
    ids=str,
)
def test_no_list_reads_all_files(tmp_path: Path, filters: Filters) -> None:
    """SQLite plans without statistics: an empty store plans like one of a million files."""
    with Store.open(f"sqlite:///{tmp_path / 's.db'}") as store, connect(store.engine) as connection:
        asked: list[tuple[str, Any]] = []
        sa.event.listen(
            store.engine, "before_cursor_execute", lambda _c, _cur, text, values, *_: asked.append((text, values))
        )
        page(connection, filters, "dr_a", 50)
        assert asked
        for text, values in list(asked):
            steps = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)]
            others = [step for step in steps if re.match(r"(SEARCH|SCAN) other", step)]
            assert others and all("ix_files_image_id (image_id=?)" in step for step in others), steps
            assert not [step for step in steps if step.startswith("SCAN files") and "USING" not in step], steps
            if filters.disagreement or filters.reader or filters.reviewed == "disputed":
                assert steps[0].startswith(("SCAN review_status", "SEARCH review_status")), steps
            else:
                assert not [step for step in steps if step.startswith("USE TEMP B-TREE")], steps
