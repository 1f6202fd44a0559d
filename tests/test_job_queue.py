"""The job queue of watch: who may claim a file, until when, and whose outcome counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import select

from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.store import Backoff, JobQueue, Run, Store, StoreDown, path_to_text, presence, retry_now
from cxrbatch.store.connection import connect
from cxrbatch.store.housekeeping import prune
from cxrbatch.store.rejected import rejected_page, retry_file
from cxrbatch.store.schema import files
from cxrbatch.types import FoundFile, Outcome
from store_images import CASCADE, OTHER_CASCADE, begin, found, linked, reject, scored_file

WAITS = Backoff(first_s=10, most_s=60, truncated_tries=3)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[Store]:
    with Store.open(store_url, clock=clock) as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run("{}", CASCADE, device="cpu", engine="torch", host="here", version="0.1.0")


@pytest.fixture
def one(store: Store, run: Run) -> JobQueue:
    return JobQueue(store, run, "one", 60, WAITS)


@pytest.fixture
def two(store: Store, run: Run) -> JobQueue:
    return JobQueue(store, run, "two", 60, WAITS)


def offer(job_queue: JobQueue, *paths: str, **file: Any) -> int:
    return job_queue.offer([found(path, **file) for path in paths], inodes_tell=True)


def taken(job_queue: JobQueue, most: int = 100, roots: tuple[str, ...] = ("/in",)) -> list[str]:
    return sorted(claimed.file.path for claimed in job_queue.claim(roots, most))


def states(store: Store) -> dict[str, str]:
    with connect(store.engine) as connection:
        return {row.path: row.state for row in connection.execute(select(files.c.path, files.c.state))}


def test_what_is_offered_is_claimed_once(one: JobQueue, two: JobQueue, store: Store) -> None:
    assert offer(one, "/in/a", "/in/b", "/in/c") == 3
    assert offer(two, "/in/a", "/in/b", "/in/c") == 3  # it says so, but they keep their place
    first, second = taken(one, 2), taken(two, 2)
    assert len(first) == 2 and len(second) == 1 and sorted(first + second) == ["/in/a", "/in/b", "/in/c"]
    assert taken(one) == taken(two) == []
    assert offer(one, "/in/a") == 1 and taken(two) == []  # offered again: still in hand


def test_a_claim_says_what_was_offered(one: JobQueue) -> None:
    file = FoundFile("/in/\udcff odd", 2**40, 1_700_000_000_123_456_789, 2**64 - 3)
    one.offer([file], inodes_tell=True)
    (claimed,) = one.claim(["/in"], 10)
    assert claimed.file == file and claimed.text == path_to_text(file.path)


def test_a_path_too_long_to_keep_comes_without_its_name(one: JobQueue) -> None:
    path = "/in/" + "long/" * 700
    offer(one, path)
    (claimed,) = one.claim(["/in"], 10)
    assert claimed.file.path == "" and claimed.text == path_to_text(path)


def test_claims_stay_below_their_roots(one: JobQueue) -> None:
    offer(one, "/in/a", "/inside/b", "/other/c")
    assert taken(one) == ["/in/a"]
    assert taken(one, roots=("/other", "/inside")) == ["/inside/b", "/other/c"]


def test_any_number_of_folders_has_one_queue(one: JobQueue) -> None:
    roots = tuple(f"/in{k}" for k in range(700))  # SQLite nests conditions at most 1,000 deep
    offer(one, "/in0/a", "/in699/a", "/in1/a", "/elsewhere/a")
    assert one.unfinished(roots)
    assert taken(one, 2, roots) + taken(one, 2, roots) != [] and taken(one, 2, roots) == []
    one.release()
    assert taken(one, 4, roots) == ["/in0/a", "/in1/a", "/in699/a"]
    assert not one.unfinished(roots[2:-1])


def test_files_that_are_named_are_claimed_and_nothing_beside_them(store: Store, run: Run) -> None:
    names = [f"/in/{i:04}\\x" for i in range(300)]
    one = JobQueue(store, run, "one", 60, WAITS, named=frozenset(names))
    offer(one, *names, "/in/beside", "/other/a")
    assert taken(one, 400, roots=(*names, "/other")) == [*names, "/other/a"]
    assert one.unfinished(names) and not one.unfinished(["/elsewhere"])
    assert taken(one, 400, roots=("/in",)) == ["/in/beside"]


def test_an_outcome_ends_the_lease_and_an_unchanged_file_is_left_alone(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/junk")
    taken(one)
    recorded = one.record([scored_file("/in/a"), reject("/in/junk")])
    assert (recorded.done, recorded.rejected, recorded.late) == (1, 1, 0)
    assert offer(one, "/in/a", "/in/junk") == 0
    assert states(store) == {"/in/a": "done", "/in/junk": "rejected"}
    assert taken(one) == []


def test_a_change_sends_any_file_back_and_drops_what_was_said_of_the_old_bytes(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/b")
    taken(one)
    one.record([scored_file("/in/a"), reject("/in/b")])
    assert offer(one, "/in/a", "/in/b", size=2000) == 2
    assert {(row.state, row.label, row.reason_code) for row in store.results()} == {("waiting", None, None)}
    assert taken(one) == ["/in/a", "/in/b"]


def test_another_inode_is_another_file_where_inodes_can_be_trusted(one: JobQueue) -> None:
    offer(one, "/in/a")
    taken(one)
    one.record([scored_file("/in/a")])
    replaced = [found("/in/a", inode=8)]
    assert one.offer(replaced, inodes_tell=False) == 0
    assert one.offer(replaced, inodes_tell=True) == 1
    assert taken(one) == ["/in/a"]


def test_a_file_that_changes_in_hand_makes_the_old_answer_late(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a")
    taken(one)
    offer(one, "/in/a", size=2000)
    assert one.record([scored_file("/in/a")]).late == 1
    assert states(store) == {"/in/a": "waiting"}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_of_two_versions_in_hand_the_new_one_counts(one: JobQueue, store: Store, together: bool) -> None:
    """The file is replaced while it is decoded, claimed again by the same daemon, and the old answer comes last."""
    versions = [scored_file("/in/a", label, content=label, inode=k) for k, label in enumerate(("NORMAL", "COVID19"))]
    for version in versions:  # of one size and time
        one.offer([version.file], inodes_tell=True)
        assert taken(one) == ["/in/a"]
    old, new = versions
    recorded = [one.record([new, old])] if together else [one.record([old]), one.record([new])]
    assert (sum(each.done for each in recorded), sum(each.late for each in recorded)) == (1, 1)
    assert [(row.state, row.label) for row in store.results()] == [("done", "COVID19")]


def test_a_lease_that_runs_out_is_taken_over_and_the_late_write_loses(
    one: JobQueue, two: JobQueue, store: Store, clock: Clock
) -> None:
    offer(one, "/in/a", "/in/b")
    assert taken(one) == ["/in/a", "/in/b"]
    clock.pass_s(59)
    assert taken(two) == []
    clock.pass_s(2)
    assert taken(two, 1) in (["/in/a"], ["/in/b"])
    assert len(taken(two)) == 1
    assert two.record([scored_file("/in/a", "COVID19")]).done == 1
    late = one.record([scored_file("/in/a", "NORMAL"), scored_file("/in/b", "NORMAL")])
    assert (late.late, late.done) == (2, 0)
    assert {row.path: row.label for row in store.results()} == {"/in/a": "COVID19", "/in/b": None}
    assert two.record([scored_file("/in/b", "COVID19")]).done == 1


def test_a_claim_whose_answer_was_lost_is_found_by_the_next(
    one: JobQueue, two: JobQueue, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit succeeded and its answer was lost: leases would be renewed for ever without any work."""
    dialect = store.engine.dialect
    commit = dialect.do_commit

    def commit_and_lose(connection: Any) -> None:
        commit(connection)
        raise dialect.loaded_dbapi.OperationalError("disk I/O error: the server closed the connection")

    offer(one, "/in/a", "/in/b", "/in/c")
    assert taken(one, 1) == ["/in/a"]
    with monkeypatch.context() as broken:
        broken.setattr(dialect, "do_commit", commit_and_lose)
        with pytest.raises(StoreDown):
            one.claim(["/in"], 1)
    assert sorted([*taken(two), *taken(one)]) == ["/in/b", "/in/c"]
    assert taken(one) == []
    offer(one, "/in/a", size=2000)  # replaced while it is in hand
    with monkeypatch.context() as broken:
        broken.setattr(dialect, "do_commit", commit_and_lose)
        with pytest.raises(StoreDown):
            one.claim(["/in"], 1)
    assert taken(one) == ["/in/a"]
    assert one.record([scored_file("/in/a"), scored_file("/in/a", size=2000)]).done == 1
    assert not {"/in/a"} & one.in_hand.keys()


def test_a_lease_that_ran_out_but_was_not_taken_still_counts(one: JobQueue, clock: Clock) -> None:
    offer(one, "/in/a")
    taken(one)
    clock.pass_s(1000)
    assert one.record([scored_file("/in/a")]).done == 1


def test_a_heartbeat_keeps_what_is_in_hand(one: JobQueue, two: JobQueue, clock: Clock) -> None:
    offer(one, "/in/a", "/in/b")
    taken(one)
    for _ in range(5):
        clock.pass_s(40)
        assert one.renew() == 2 and two.renew() == 0
    assert taken(two) == []


def test_what_is_released_can_be_taken_at_once(one: JobQueue, two: JobQueue, clock: Clock) -> None:
    offer(one, "/in/a", "/in/b", "/in/c")
    taken(one)
    assert one.release(["/in/b"], for_s=30) == 1
    assert taken(two) == []
    assert one.release() == 2 and two.release() == 0
    assert taken(two) == ["/in/a", "/in/c"]
    clock.pass_s(30)
    assert taken(one) == ["/in/b"]
    assert one.release_everybodys() == 3


def test_waits_grow_until_they_do_not(one: JobQueue, store: Store, clock: Clock) -> None:
    offer(one, "/in/a")
    for wait_s in (10, 20, 40, 60, 60):
        assert taken(one) == ["/in/a"]
        one.record([reject("/in/a", ReasonCode.UNREADABLE)])
        assert states(store) == {"/in/a": "retry"}
        offer(one, "/in/a")  # a walk does not hurry it
        clock.pass_s(wait_s - 1)
        assert taken(one) == []
        clock.pass_s(1)
    assert taken(one) == ["/in/a"]
    assert one.record([scored_file("/in/a")]).done == 1


def test_watch_once_tries_no_file_twice_however_short_the_waits(one: JobQueue, store: Store, clock: Clock) -> None:
    with connect(store.engine) as connection:
        began = store.now(connection)
    once = replace(one, retries_due_by=began, backoff=Backoff(1, 1, 5))
    offer(once, "/in/a")
    assert taken(once) == ["/in/a"]
    once.record([reject("/in/a", ReasonCode.UNREADABLE)])
    clock.pass_s(60)
    assert taken(once) == []
    assert states(store) == {"/in/a": "retry"}
    assert taken(one) == ["/in/a"]


def test_a_truncated_file_may_still_be_on_its_way_but_not_for_ever(one: JobQueue, store: Store, clock: Clock) -> None:
    offer(one, "/in/a")
    seen = []
    for _ in range(3):
        assert taken(one) == ["/in/a"]
        one.record([reject("/in/a", ReasonCode.TRUNCATED)])
        seen.append(states(store)["/in/a"])
        clock.pass_s(60)
    assert seen == ["retry", "retry", "rejected"]
    assert taken(one) == [] and offer(one, "/in/a") == 0
    assert offer(one, "/in/a", size=5) == 1  # it grew after all


def test_a_scan_leaves_truncated_files_final_and_reads_one_that_watch_would_try_again(
    one: JobQueue, store: Store
) -> None:
    store.record(one.run.run_id, one.run.cascade_id, [reject("/in/scanned", ReasonCode.TRUNCATED)])
    assert states(store)["/in/scanned"] == "rejected"
    offer(one, "/in/a")
    taken(one)
    one.record([reject("/in/a", ReasonCode.TRUNCATED)])
    assert store.unchanged([found("/in/a"), found("/in/scanned")], one.run.cascade_id) == {"/in/scanned"}


def test_what_a_scan_left_to_be_tried_again_is_tried_by_a_watch(one: JobQueue, store: Store) -> None:
    store.record(one.run.run_id, one.run.cascade_id, [reject("/in/a", ReasonCode.UNREADABLE)])
    assert taken(one) == ["/in/a"]  # a watch that knows the file would not offer it again


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_scan_beside_a_watch_overwrites_nothing_that_is_newer(one: JobQueue, store: Store, clock: Clock) -> None:
    scan = begin(store)
    replaced, failing, claimed = (found(f"/in/{name}") for name in "abc")
    assert store.unchanged([replaced, failing, claimed], scan.cascade_id) == set()  # the scan finds and reads them
    clock.pass_s(1)
    newer = scored_file("/in/a", "COVID19", content="new", size=1001, mtime_ns=replaced.mtime_ns + 5)
    one.offer([newer.file, failing], inodes_tell=True)
    assert taken(one) == ["/in/a", "/in/b"]
    one.record([newer, scored_file("/in/b", "NORMAL")])
    older = scored_file("/in/d", "COVID19", content="older", size=1001, mtime_ns=replaced.mtime_ns - 5)
    put_back = scored_file("/in/e", "COVID19", content="older", size=1001, mtime_ns=replaced.mtime_ns - 5)
    one.offer([claimed, older.file, put_back.file], inodes_tell=True)  # of /in/d and e, the scan has the file before
    assert taken(one) == ["/in/c", "/in/d", "/in/e"]
    one.record([put_back])
    late = [
        scored_file("/in/a", "NORMAL", content="old"),
        reject("/in/b", ReasonCode.UNREADABLE),
        reject("/in/c", ReasonCode.UNREADABLE),
        scored_file("/in/d", "NORMAL", content="old"),
        reject("/in/e", ReasonCode.CHANGED_WHILE_READ),
    ]
    assert store.record(scan.run_id, scan.cascade_id, late).late == 5
    assert store.record(scan.run_id, scan.cascade_id, late[:1], replace=True).late == 1
    assert states(store) == dict.fromkeys(("/in/a", "/in/b", "/in/e"), "done") | dict.fromkeys(
        ("/in/c", "/in/d"), "claimed"
    )
    one.record([scored_file("/in/c", "NORMAL"), older])
    labels = {"/in/a": "COVID19", "/in/b": "NORMAL", "/in/c": "NORMAL", "/in/d": "COVID19", "/in/e": "COVID19"}
    assert {row.path: row.label for row in store.results()} == labels


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_file_that_a_watch_takes_while_a_scan_looks_for_it_is_not_missing(
    one: JobQueue, store: Store, clock: Clock
) -> None:
    store.record(one.run.run_id, one.run.cascade_id, [scored_file("/in/a"), scored_file("/in/b")])
    clock.pass_s(60)
    scan, began = begin(store), store.time()
    clock.pass_s(1)

    class Seen(set[str]):
        def __contains__(self, text: object) -> bool:
            """There is no such file; now there is another one."""
            if text == "/in/a":
                offer(one, "/in/a", size=2)
                one.claim(["/in"], 8)
                one.record([scored_file("/in/a", content="new", size=2)])
            return False

    assert store.mark_missing(scan.run_id, ["/in"], Seen(), since=began) == 1
    assert states(store) == {"/in/a": "done", "/in/b": "missing"}


def test_a_copy_that_another_watch_has_in_hand_is_repaired_without_a_fault(
    one: JobQueue, two: JobQueue, store: Store
) -> None:
    """After an upgrade of the bundle: the first copy is scored, the second one is claimed and shows the old answer."""
    old = begin(store, OTHER_CASCADE)
    copies = [scored_file(f"/in/{name}", "NORMAL", content="same") for name in "ab"]
    store.record(old.run_id, old.cascade_id, copies)
    one.offer([copy.file for copy in copies], inodes_tell=True)
    assert taken(one) == ["/in/a", "/in/b"]
    one.record([scored_file("/in/a", "COVID19", content="same")])
    two.offer([copies[1].file], inodes_tell=True)
    assert states(store) == {"/in/a": "done", "/in/b": "done"}
    assert {row.label for row in store.results()} == {"COVID19"}
    assert one.record([scored_file("/in/b", "COVID19", content="same")]).late == 1


def test_what_waits_for_another_bundle_is_done_again_once_the_old_one_is_back(one: JobQueue, store: Store) -> None:
    old = begin(store, OTHER_CASCADE)
    store.record(old.run_id, old.cascade_id, [scored_file("/in/a", "NORMAL")])
    one.offer([found("/in/a")], inodes_tell=True)
    assert states(store) == {"/in/a": "waiting"}
    assert store.unchanged([found("/in/a")], old.cascade_id) == {"/in/a"}
    assert states(store) == {"/in/a": "done"}


def test_a_name_that_is_no_file_gets_its_outcome_without_being_opened(one: JobQueue, store: Store) -> None:
    fifo = found("/in/fifo", problem=Rejected(ReasonCode.NOT_A_REGULAR_FILE, "A FIFO."))
    shut = found("/in/shut", problem=Retry(ReasonCode.PERMISSION_DENIED, "A folder."))
    assert one.offer([fifo, shut, found("/in/a")], inodes_tell=True) == 1
    assert states(store) == {"/in/fifo": "rejected", "/in/shut": "retry", "/in/a": "waiting"}
    assert taken(one) == ["/in/a"]
    with connect(store.engine) as connection:
        rows, _, _ = rejected_page(connection, "", 0, 100)
    assert len(rows) == 2
    assert (
        retry_now(store, None) == sum(retry_file(store, row.id) for row in rows) == 0
    )  # only the walk can say that they have healed
    assert one.offer([found("/in/fifo")], inodes_tell=True) == 1


def test_a_name_that_leads_to_an_older_thing_is_no_longer_its_file(one: JobQueue, store: Store, clock: Clock) -> None:
    offer(one, "/in/a")
    taken(one)
    clock.pass_s(1)  # seen since this daemon began
    one.record([scored_file("/in/a")])
    broken = Rejected(ReasonCode.SYMLINK_BROKEN, "A link.")
    one.offer([found("/in/a", mtime_ns=1_600_000_000_000_000_000, problem=broken)], inodes_tell=True)
    assert states(store) == {"/in/a": "rejected"}


@pytest.mark.parametrize("gone", [False, True], ids=["shown by another", "missing"])
def test_a_file_that_changes_between_look_and_repair_is_not_repaired(
    one: JobQueue, store: Store, clock: Clock, gone: bool
) -> None:
    other = begin(store, OTHER_CASCADE)
    for run, label in ((one.run, "NORMAL"), (other, "COVID19")):
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a", label)])
    cascade_id = other.cascade_id if gone else one.run.cascade_id
    if gone:
        one.mark_missing(["/in"], set())
    with connect(store.engine) as connection:
        before = presence.look_up(connection, [found("/in/a")], cascade_id)
    assert bool(before.returned) == gone and bool(before.shown_by_another) != gone
    offer(one, "/in/a", size=2000)
    if gone:
        one.mark_missing(["/in"], set())
    with connect(store.engine, write=True) as connection:
        presence.repair(connection, before, cascade_id, clock())
    assert states(store) == {"/in/a": "missing" if gone else "waiting"}
    assert {row.label for row in store.results()} == {None}


def test_a_file_that_comes_back_while_prune_forgets_it_has_a_row(
    one: JobQueue, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.record(one.run.run_id, one.run.cascade_id, [scored_file("/in/a"), scored_file("/in/b")])
    one.mark_missing(["/in"], set())
    look_up = presence.look_up

    def look_up_and_prune(*args: Any, **more: Any) -> Any:
        up_to_date = look_up(*args, **more)
        assert len(up_to_date.returned) == 1
        assert prune(store, 0, really=True).files == 2
        return up_to_date

    monkeypatch.setattr(presence, "look_up", look_up_and_prune)
    assert store.unchanged([found("/in/a")], one.run.cascade_id) == set(), "it is read anew"
    if store.engine.dialect.name == "postgresql":  # a transaction of SQLite is the only one that writes
        store.record(one.run.run_id, one.run.cascade_id, [scored_file("/in/a"), scored_file("/in/b")])
        one.mark_missing(["/in"], set())
        assert offer(one, "/in/b") == 1
        assert states(store) == {"/in/b": "waiting"}


def test_retry_now(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/b", "/in/c")
    taken(one)
    one.record([reject("/in/a"), reject("/in/b", ReasonCode.UNREADABLE), scored_file("/in/c")])
    assert retry_now(store, ReasonCode.TRUNCATED) == 0
    assert retry_now(store, ReasonCode.UNREADABLE) == 1
    assert taken(one) == ["/in/b"]
    assert retry_now(store, None) == 1
    assert taken(one) == ["/in/a"]


def test_what_is_missing_comes_back_with_its_outcome(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/b")
    taken(one)
    one.record([scored_file("/in/a")])
    assert one.mark_missing(["/in"], set()) == 2  # also the one in hand
    assert one.record([scored_file("/in/b")]).late == 1
    assert offer(one, "/in/a", "/in/b") == 1
    assert states(store) == {"/in/a": "done", "/in/b": "waiting"}


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_what_another_daemon_has_queued_since_the_walk_began_is_not_missing(
    one: JobQueue, two: JobQueue, store: Store, clock: Clock
) -> None:
    offer(two, "/in/a")
    clock.pass_s(60)
    began = store.time()
    clock.pass_s(1)
    offer(two, "/in/b")  # put where this walk had been already
    assert one.mark_missing(["/in"], set(), since=began) == 1
    assert states(store) == {"/in/a": "missing", "/in/b": "waiting"}


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_clock_that_is_set_back_hides_neither_a_change_nor_a_file_that_is_gone(store: Store, clock: Clock) -> None:
    begun = begin(store)
    store.record(begun.run_id, begun.cascade_id, [scored_file("/in/a"), scored_file("/in/b")])
    clock.pass_s(-3600)
    scan, began = begin(store), store.time()
    older = scored_file("/in/a", "COVID19", content="put back", size=1001, mtime_ns=1)
    assert store.record(scan.run_id, scan.cascade_id, [older]).done == 1
    assert store.mark_missing(scan.run_id, ["/in"], {"/in/a"}, since=began) == 1
    assert [(row.path, row.label, row.state) for row in store.results()] == [
        ("/in/a", "COVID19", "done"),
        ("/in/b", "NORMAL", "missing"),
    ]


class SlowClock(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) - timedelta(hours=1)


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_machine_whose_clock_is_slow_takes_no_file_for_an_older_one(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(store_url) as store:
        before = begin(store)
        store.record(before.run_id, before.cascade_id, [scored_file("/in/a")])
        monkeypatch.setattr("cxrbatch.store.store.datetime", SlowClock)
        scan = begin(store)
        another = replace(found("/in/a"), size=2, mtime_ns=1)  # put back from a backup, say
        outcome = replace(scored_file("/in/a", "COVID19", content="another"), file=another)
        assert store.record(scan.run_id, scan.cascade_id, [outcome]).done == 1


def test_known_content_is_linked(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/b")
    taken(one)
    one.record([scored_file("/in/a", "COVID19", content="same")])
    one.record([linked("/in/b", "same")])
    assert {row.label for row in store.results()} == {"COVID19"}


def test_a_new_cascade_scores_again_and_the_old_prediction_shows_until_then(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a")
    taken(one)
    one.record([scored_file("/in/a", "NORMAL")])
    other = JobQueue(
        store,
        store.begin_run("{}", OTHER_CASCADE, device="cpu", engine="torch", host="here", version="1"),
        "other",
        60,
        WAITS,
    )
    assert offer(other, "/in/a") == 1
    assert {(row.state, row.label) for row in store.results()} == {("waiting", "NORMAL")}
    assert taken(other) == ["/in/a"]
    other.record([scored_file("/in/a", "COVID19")])
    assert {(row.state, row.label) for row in store.results()} == {("done", "COVID19")}


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_claim_does_not_read_past_what_is_done(one: JobQueue, store: Store) -> None:
    offer(one, *(f"/in/{i:05}" for i in range(5_000)))
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE files")
    said: list[tuple[str, Any]] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda c, cur, text, values, *_: said.append((text, values)))
    one.claim(["/in"], 8)
    one.unfinished(["/in"])
    queries = [(text, values) for text, values in said if "LIMIT" in text]
    with connect(store.engine) as connection:
        for what, (text, values) in zip(("retries", "expired", "waiting", "any"), queries, strict=True):
            steps = "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {text}", values))
            assert "Seq Scan" not in steps, steps
            assert "Sort" not in steps or what in ("retries", "expired"), "all that wait would be read"


def test_a_scan_on_a_cluster_is_the_next_try_of_what_failed(one: JobQueue, store: Store) -> None:
    offer(one, "/in/a", "/in/b")
    taken(one)
    one.record([Outcome(found("/in/a"), rejected=Retry(ReasonCode.UNREADABLE, "Later.")), reject("/in/b")])
    offer(one, "/in/a")
    assert taken(one) == [] and states(store) == {"/in/a": "retry", "/in/b": "rejected"}
    assert one.offer([found("/in/a"), found("/in/b")], inodes_tell=False, retry_at_once=True) == 1
    assert taken(one) == ["/in/a"]
