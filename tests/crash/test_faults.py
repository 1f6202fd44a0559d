"""The N-th call fails; the fault clears; nothing is lost. Faults are injected into a real daemon process."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from server import OwnPostgres
from test_receiving import free_port, listens, send

from cxrbatch.intake.receiver import file_name
from faults import DATABASE_CALLS, FILE_CALLS, RECEIVER_CALLS
from pipelines import image
from test_receiver import instance
from watchers import CRASH_N, WAIT_LIMIT_S, Place, Process

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

ERRORS = {
    **dict.fromkeys((*FILE_CALLS, *RECEIVER_CALLS), ("EIO", "ENOSPC", "EACCES", "ESTALE", "EMFILE", "MemoryError")),
    **dict.fromkeys(DATABASE_CALLS, ("OperationalError", "MemoryError")),
}
PAIRS = [(call, error) for call, errors in ERRORS.items() for error in errors]
#: A starting daemon makes calls that it never makes again; "connect" is one of them.
AT_THE_START = [
    (call, error, nth)
    for call in ("scandir", "stat", "connect", "execute", "commit", "committed")
    for error in ("EIO", "MemoryError", "OperationalError")
    for nth in (1, 2, 3, 5, 8, 13)
    if error in ERRORS[call]
]
SHARE = [
    ("scandir", "EIO", 1),
    ("getdents", "ESTALE", 2),
    ("open", "EMFILE", 2),
    ("read", "MemoryError", 2),
    ("fsync", "EIO", 2),
    ("committed", "OperationalError", 2),
    ("execute", "MemoryError", 3),
]
LATER = [(call, error, nth) for nth in (1, 2, 3, 5, 8, 13) for call, error in PAIRS if call != "connect"]


@pytest.mark.parametrize(("call", "error", "nth"), AT_THE_START if CRASH_N else [("commit", "OperationalError", 4)])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"] if CRASH_N else ["sqlite"])
def test_the_nth_call_fails(
    new_place: Callable[[str], Place],
    undisturbed: dict[str, tuple[Any, ...]],
    kind: str,
    call: str,
    error: str,
    nth: int,
) -> None:
    """The daemon survives, or ends and is started again as by systemd. Both are fine; a lost file is not."""
    place = new_place(kind)
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2"}
    daemon = place.start(**env, TEST_FAULT=f"{call}:{error}:{nth}")
    deadline = time.monotonic() + WAIT_LIMIT_S
    while place.rows() != undisturbed and time.monotonic() < deadline:
        if daemon.poll() is not None:
            daemon = place.start(**env)
        time.sleep(0.25)
    place.wait(lambda: place.rows() == undisturbed, daemon)
    ended = place.stop(daemon)
    assert ended == 0 or (ended == 1 and error == "MemoryError")  # its turn may come when all the rows are there
    assert "Traceback" not in place.log
    place.check(undisturbed)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"] if CRASH_N else ["sqlite"])
def test_calls_that_fail_one_after_the_other(new_place: Callable[[str], Place], kind: str) -> None:
    """One store and folder, new images for each fault; faults in the daemon, its decode processes and its receiver."""
    place = new_place(kind)
    plan, port = place.cwd / "plan", free_port()
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2"}
    env |= {"CXRBATCH_MIN_FREE_MIB": "1", "TEST_FAULT_FILE": str(plan)}

    def start() -> Process:
        started = place.start("--listen", f"127.0.0.1:{port}", **env)
        place.wait(lambda: listens(port), started)
        return started

    def all_there() -> bool:
        rows = place.rows()
        return rows.keys() == place.files() and {row[0] for row in rows.values()} <= {"done", "rejected"}

    daemon = start()
    place.wait(all_there, daemon)
    reached, ended, faults = Counter[str](), Counter[str](), LATER if CRASH_N else SHARE
    for number, (call, error, nth) in enumerate(faults):
        (place.cwd / "next plan").write_text(f"{number}:{call}:{error}:{nth}")
        (place.cwd / "next plan").rename(plan)
        for extra in range(3):
            image(place.incoming / f"{number}" / f"{extra}.png", 5000 + 3 * number + extra)
        acknowledged: list[str] = []
        sent = [instance(seed=10 * number + extra) for extra in range(2)] if call in RECEIVER_CALLS else []
        for dataset in sent:  # until it is accepted, as senders do
            for _ in range(5):
                if str(dataset.SOPInstanceUID) not in acknowledged:
                    send(port, dataset, acknowledged)
        assert len(acknowledged) == len(sent), (call, error, nth)
        deadline = time.monotonic() + WAIT_LIMIT_S
        while not all_there():
            assert time.monotonic() < deadline, (call, error, nth, place.rows(), place.log[-3000:])
            if daemon.poll() is not None:
                ended[call] += 1
                daemon = start()
            time.sleep(0.1)
        reached[call] += (place.cwd / f"plan.{number}").exists()
        assert {file_name(uid) for uid in acknowledged} <= place.files()
    print(f"{len(faults)} faults on {kind}; reached {dict(reached)}; the daemon ended {dict(ended)}")
    plan.unlink()
    if daemon.poll() is None:
        assert place.stop(daemon) == 0
    assert "Traceback" not in place.log
    place.check(place.undisturbed())
    assert reached.total() >= len(faults) // 2


def test_an_unreadable_file_is_read_once_it_can_be(new_place: Callable[[str], Place]) -> None:
    place = new_place("sqlite")
    (place.incoming / "cut.png").write_bytes((place.incoming / "0" / "0.png").read_bytes()[:150])
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="100")
    place.wait(lambda: place.rows().get("cut.png", ("",))[0] == "retry", daemon)
    assert place.rows()["cut.png"][3] == "truncated"
    image(place.incoming / "cut.png", 77)
    place.wait(lambda: place.rows()["cut.png"][0] == "done", daemon)
    assert place.stop(daemon) == 0


def test_a_postgres_that_goes_away_and_comes_back(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], postgres_url: str
) -> None:
    """Its back-ends are terminated repeatedly while images come in."""
    place = new_place("postgres")
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1", TEST_SLOW_S="0.2", CXRBATCH_BATCH_SIZE="2")
    name = place.url.rpartition("/")[2].partition("?")[0]
    began = time.monotonic()
    for extra in range(10 if CRASH_N == 0 else 100):
        image(place.incoming / "more" / f"{extra}.png", 3000 + extra)
        place.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
        )
        time.sleep(0.5)
    place.wait(place.settled, daemon)
    said = place.log.count("store_down") + place.log.count("store_back")
    assert said <= 2 + (time.monotonic() - began) / 10, place.log[-2000:]
    assert place.stop(daemon) == 0
    rows = place.rows()
    assert undisturbed.items() <= rows.items()
    place.check(rows)


def test_postgres_stopped_for_a_while(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], own_postgres: OwnPostgres
) -> None:
    """Killed, down for a while, started again: no loss, few log lines, memory as before."""
    place = new_place("sqlite")
    place.url = own_postgres.url
    assert place.run("upgrade", command="db") == 0
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1", CXRBATCH_LEASE_S="5")
    place.wait(place.settled, daemon)
    own_postgres.kill()
    lines, memory = place.log.count("\n"), psutil.Process(daemon.pid).memory_info().rss
    for extra in range(20):
        image(place.incoming / "more" / f"{extra}.png", 4000 + extra)
    away_s = 60 if CRASH_N else 6
    time.sleep(away_s)
    assert daemon.poll() is None
    assert psutil.Process(daemon.pid).memory_info().rss < memory + 32 * 2**20
    said = place.log.count("\n") - lines
    assert said <= max(2, away_s / 10), place.log[-2000:]
    own_postgres.start()
    place.wait(place.settled, daemon)
    assert "store_down" in place.log and "store_back" in place.log
    assert place.stop(daemon) == 0
    rows = place.rows()
    assert undisturbed.items() <= rows.items()
    place.check(rows)


def test_a_disk_that_is_full_under_the_store(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    """The daemon says so, also where only its watcher has something to write, and waits until there is room again."""
    place = new_place("sqlite")
    disk, outside = place.cwd / "disk", place.cwd / "outside"
    place.incoming.rename(outside)
    with small_disk(disk):
        place.url = f"sqlite:///{disk}/store.db"
        daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1")
        place.wait(lambda: "ready" in place.log, daemon)
        ballast = disk / "ballast"
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for path in outside.iterdir():
            path.rename(place.incoming / path.name)
        place.wait(lambda: "store_down" in place.log, daemon)
        time.sleep(2)
        assert daemon.poll() is None and place.log.count("store_down") <= 3
        ballast.unlink()
        place.wait(lambda: place.rows() == undisturbed, daemon)
        assert place.stop(daemon) == 0
        place.check(undisturbed)


def test_a_share_that_is_unmounted_for_a_while(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    """An empty mount point is left, which must not be taken for an empty folder."""
    place = new_place("sqlite")
    share, behind = place.cwd / "in", place.cwd / "behind"
    share.rename(behind)
    share.mkdir()
    with suppress(subprocess.CalledProcessError):
        bind(behind, share)
    if not any(share.iterdir()):
        pytest.skip("mounting is not allowed here")
    # A bind mount of the same file system has the same st_dev as the mount point: put that on another one.
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1")
    try:
        place.wait(lambda: place.rows() == undisturbed, daemon)
        unmount(share)
        with small_disk(share):
            place.wait(lambda: "folder_paused" in place.log, daemon)
            time.sleep(30 if CRASH_N else 3)
            assert place.rows() == undisturbed
            assert place.log.count("folder_paused") == 1
        image(behind / "meanwhile.png", 5)
        bind(behind, share)
        place.wait(lambda: "folder_back" in place.log and "meanwhile.png" in place.rows() and place.settled(), daemon)
        assert place.stop(daemon) == 0
        rows = place.rows()
        assert undisturbed.items() <= rows.items()
        assert not place.ask("SELECT 1 FROM audit WHERE event IN ('missing', 'returned')")
        place.check(rows)
    finally:
        unmount(share)


def test_a_folder_that_is_mounted_read_only(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    """`watch` only reads there."""
    place = new_place("sqlite")
    try:
        bind(place.incoming, place.incoming)
        subprocess.run(["mount", "-o", "remount,bind,ro", place.incoming], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (place.incoming / "x").touch()
        assert place.run("--once", CXRBATCH_TRUNCATED_TRIES="1") == 3
        place.check(undisturbed)
    finally:
        unmount(place.incoming)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 2 MiB at `folder`."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        unmount(folder)


def bind(folder: Path, there: Path) -> None:
    subprocess.run(["mount", "--bind", folder, there], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)
