"""The outbox: each object once a destination, in one sender's hand at a time, and nothing forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cxrbatch.ops.status import Limits, State, Status, judge
from cxrbatch.store import Backoff, JobQueue, ReviewAction, Store, housekeeping, outbox
from cxrbatch.store.backlog import read_backlog
from cxrbatch.store.outbox import Answer, Outbox, OutboxItem
from cxrbatch.store.outbox_schema import SUPERSEDED, OutboxState
from cxrbatch.store.reported import Selection
from cxrbatch.store.schema import FileState
from cxrbatch.types import DecodedImage, FoundFile, ImageFacts, Outcome
from dicom_results import CASCADE, record_files, written
from store_images import OTHER_CASCADE, begin, review

KINDS = ("sc", "sr")
SENT = Answer(OutboxState.SENT, "0x0000", "2.25.1")
LATER = Answer(OutboxState.WAITING, "0xA700", "2.25.1")
REFUSED = Answer(OutboxState.REFUSED, "0xC001", "2.25.1")


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(store_url: str, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    with Store.open(store_url, clock=clock) as opened:
        record_files(opened, written(tmp_path / "in", 3))
        yield opened


def box(store: Store, name: str = "pacs") -> Outbox:
    return Outbox(store, name, lease_s=60, backoff=Backoff(10, 100, 5))


def test_what_is_there_is_not_put_in_again(store: Store) -> None:
    assert box(store).enqueue(Selection(), KINDS) == 6
    assert box(store).enqueue(Selection(), KINDS) == 0
    assert box(store, "other").enqueue(Selection(), ["sr"]) == 3
    assert box(store).progress().waiting == 6


def test_a_claim_is_one_senders_until_its_lease_ends(store: Store, clock: Clock) -> None:
    box(store).enqueue(Selection(), KINDS)
    first, second = box(store).claim(4), box(store).claim(4)
    assert len(first) == 4 and len(second) == 2 and box(store).claim(4) == []
    assert not {item.id for item in first} & {item.id for item in second}
    assert box(store).progress().in_hand == 6
    clock.forward(61)
    assert {item.id for item in box(store).claim(9)} == {item.id for item in (*first, *second)}


def test_a_failure_waits_longer_each_time_and_success_ends_it(store: Store, clock: Clock) -> None:
    sender = box(store)
    sender.enqueue(Selection(), ["sr"])
    for wait in (10, 20, 40):
        for item in sender.claim(9):
            sender.record(item, LATER)
        clock.forward(wait - 1)
        assert sender.claim(9) == []
        clock.forward(1)
    for item in sender.claim(9):
        sender.record(item, SENT)
    assert sender.progress().sent == 3 and sender.progress().waiting == 0
    assert sender.enqueue(Selection(), ["sr"]) == 0


def test_a_person_retries_and_drops(store: Store) -> None:
    sender = box(store)
    sender.enqueue(Selection(), ["sr"])
    one, two, three = sender.claim(9)
    sender.record(one, SENT)
    sender.record(two, REFUSED)
    sender.record(three, LATER)
    assert outbox.retry(store, "pacs") == 2  # what was sent stays sent
    assert outbox.drop(store, None, [two.id]) == 1
    assert [item.id for item in sender.claim(9)] == [three.id]
    assert outbox.retry(store, "pacs", [one.id, two.id]) == 2
    assert {item.id for item in sender.claim(9)} == {one.id, two.id}
    assert outbox.drop(store, "nobody") == 0


def test_status_counts_by_state_and_warns_of_what_was_refused(store: Store) -> None:
    sender = box(store)
    sender.enqueue(Selection(), ["sr"])
    sender.record(sender.claim(1)[0], REFUSED)
    backlog = read_backlog(store)
    assert backlog.outbox == {"waiting": 2, "sent": 0, "refused": 1, "dropped": 0}
    status = Status(backlog, 0, 0, {}, [], None)
    assert (State.WARNING, "1 results were refused by a PACS (`cxrbatch outbox list`)") in judge(status, Limits())


def test_what_a_person_drops_in_a_senders_hand_stays_dropped_unless_it_arrived(store: Store) -> None:
    sender = box(store)
    sender.enqueue(Selection(), ["sr"])
    one, two, _ = sender.claim(9)
    outbox.drop(store, None, [one.id, two.id])
    sender.record(one, LATER)
    sender.record(two, SENT)
    states = {row.id: row.state for row in outbox.listed(store, None, None, 9)}
    assert states[one.id] == "dropped" and states[two.id] == "sent"


def test_a_readers_answer_is_a_new_object_and_ends_the_old_one(store: Store, clock: Clock) -> None:
    sender = box(store)
    sender.enqueue(Selection(), ["sr"])
    row = next(iter(store.results()))
    clock.forward(3600)
    (about,) = store.everything_about(row.path)
    assert about.image is not None
    review(store, about.image["id"], "reader", ReviewAction.OVERRIDE, "NORMAL")
    assert sender.enqueue(Selection(changed_since=clock.now), ["sr"]) == 1
    items = sender.claim(9)
    assert len(items) == 4
    assert sum(item.reported is None for item in items) == 1  # superseded
    assert [item.reported.final_label for item in items if item.reported and item.reported.final_label] == ["NORMAL"]
    assert box(store, "reviewed").enqueue(Selection(reviewed_only=True), ["sr"]) == 1


def send_all(sender: Outbox, answer: Answer = SENT) -> list[OutboxItem]:
    """One round of a sender; returns what is still said of the images."""
    items = sender.claim(99)
    for item in items:
        sender.record(item, answer if item.reported else Answer(OutboxState.DROPPED, SUPERSEDED))
    return [item for item in items if item.reported]


def image_of(store: Store) -> int:
    (about,) = store.everything_about(next(iter(store.results())).path)
    assert about.image is not None
    return int(about.image["id"])


@pytest.mark.parametrize("reached", [True, False], ids=["sent", "nobody answers"])
def test_a_read_that_is_undone_ends_with_the_newest_object_without_it(
    store: Store, clock: Clock, reached: bool
) -> None:
    """Whether the PACS got the objects before it or not."""
    sender, answer = box(store), SENT if reached else LATER
    sender.enqueue(Selection(), ["sr"])
    image_id = image_of(store)
    times: list[datetime] = []
    for action, label in ((ReviewAction.OVERRIDE, "NORMAL"), (ReviewAction.WITHDRAW, None)) * 2:
        send_all(sender, answer)
        clock.forward(200)
        review(store, image_id, "reader", action, label)
        assert sender.enqueue(Selection(), ["sr"]) == 1
        (newest,) = (item.reported for item in send_all(sender) if item.reported and item.reported.image_id == image_id)
        assert newest.final_label == label and newest.content_time == clock.now
        times.append(newest.content_time)
    assert times == sorted(set(times))
    assert sender.enqueue(Selection(), ["sr"]) == 0


def test_a_withdrawal_that_takes_back_nothing_is_no_new_object(store: Store, clock: Clock) -> None:
    sender, image_id = box(store), image_of(store)
    sender.enqueue(Selection(), ["sr"])
    clock.forward(10)
    for action in (ReviewAction.SKIP, ReviewAction.WITHDRAW):
        review(store, image_id, "reader", action)
        assert sender.enqueue(Selection(), ["sr"]) == 0
    for reader, label in (("a", "NORMAL"), ("b", "COVID19")):
        review(store, image_id, reader, ReviewAction.OVERRIDE, label)
    review(store, image_id, "chief", ReviewAction.OVERRIDE, "NORMAL", adjudication=True)
    assert sender.enqueue(Selection(), ["sr"]) == 1
    clock.forward(10)
    review(store, image_id, "a", ReviewAction.WITHDRAW)
    assert sender.enqueue(Selection(), ["sr"]) == 0, "the adjudication stands"
    review(store, image_id, "chief", ReviewAction.WITHDRAW, adjudication=True)
    assert sender.enqueue(Selection(), ["sr"]) == 1, "b's read is the answer again"


def test_what_was_superseded_and_is_said_again_waits_again(store: Store, clock: Clock, tmp_path: Path) -> None:
    """Another bundle for a while: its answers are other objects, those of the first one are the old ones."""
    files = sorted((tmp_path / "in").iterdir())
    sender = box(store)
    assert sender.enqueue(Selection(), ["sr"]) == 3
    first = {item.id for item in send_all(sender, LATER)}
    record_files(store, files, cascade=OTHER_CASCADE)
    assert sender.enqueue(Selection(), ["sr"]) == 3
    clock.forward(60)
    send_all(sender, LATER)
    record_files(store, files)
    assert sender.enqueue(Selection(), ["sc"]) == 3 and sender.enqueue(Selection(), ["sr"]) == 3
    assert sender.enqueue(Selection(), ["sr"]) == 0
    items = [item for item in sender.claim(99) if item.reported and item.kind == "sr"]
    assert {item.id for item in items} == first and {item.attempts for item in items} == {0}
    # What a person drops stays dropped, even if it was superseded before.
    for item in items:
        sender.record(item, Answer(OutboxState.DROPPED, SUPERSEDED))
    outbox.retry(store, "pacs", list(first))
    assert outbox.drop(store, "pacs", list(first)) == 3
    assert sender.enqueue(Selection(), ["sr"]) == 0


@pytest.mark.parametrize(
    ("selection", "images"),
    [
        (Selection(decisions=("needs_review",)), 3),
        (Selection(decisions=("reported",)), 0),
        (Selection(labels=("PNEUMONIA",)), 3),
        (Selection(labels=("NORMAL",)), 0),
        (Selection(reviewed_only=True), 0),
        (Selection(roots=("/nowhere",)), 0),
        (Selection(changed_since=datetime(2100, 1, 1, tzinfo=UTC)), 0),
    ],
)
def test_filters(store: Store, selection: Selection, images: int) -> None:
    assert box(store).enqueue(selection, ["sc"]) == images


@pytest.mark.parametrize("comes", ["back", "under another name", "with another bundle's answer"])
def test_what_comes_again_is_new_however_old_its_prediction_is(
    store: Store, clock: Clock, tmp_path: Path, comes: str
) -> None:
    """A running `watch` only looks at what has changed since its last look."""
    folder = tmp_path / "in"
    sender, first = box(store), folder / "0.dcm"
    record_files(store, [first], cascade=OTHER_CASCADE)
    run = begin(store, OTHER_CASCADE if comes == "back" else CASCADE)
    if comes != "with another bundle's answer":
        store.mark_missing(run.run_id, [str(folder)], set())
    clock.forward(86_400)
    looked = clock.now
    assert sender.enqueue(Selection(changed_since=looked), ["sr"]) == 0
    clock.forward(5)
    status = first.stat()
    found = FoundFile(str(first), status.st_size, status.st_mtime_ns, status.st_ino)
    if comes == "under another name":
        image = DecodedImage(hashlib.sha256(first.read_bytes()).hexdigest(), ImageFacts("dicom", 96, 80, 8), {})
        linked = Outcome(replace(found, path=str(folder / "again.dcm")), image)
        assert store.record(run.run_id, run.cascade_id, [linked]).done == 1
    else:
        JobQueue(store, run, "me", 60, Backoff()).offer([found], inodes_tell=True)
    assert sender.enqueue(Selection(changed_since=looked), ["sr"]) == 1


def test_copies_are_one_image_and_pruned_images_take_their_rows_along(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "in" / "copy.dcm"
    copy.write_bytes((tmp_path / "in" / "0.dcm").read_bytes())
    record_files(store, [copy])
    assert box(store).enqueue(Selection(), ["sc"]) == 3
    (item, *_) = box(store).claim(9)
    assert item.reported is not None and len(item.reported.paths) == 2
    run = store.begin_run("{}", CASCADE, device="", engine="", host="", version="")
    assert store.mark_missing(run.run_id, [str(tmp_path / "in")], set()) == 4
    assert {row.state for row in store.results()} == {FileState.MISSING}
    housekeeping.prune(store, 0, really=True, now=datetime(2101, 1, 1, tzinfo=UTC))
    assert outbox.listed(store, None, None, 9) == []
