"""The N-th call fails; the fault clears; nothing is lost. In the daemon's own process, with everything else real."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from server import OwnPostgres

from road import film
from watching import CRASH_N, Place

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

OS_ERRORS = ("EIO", "ENOSPC", "EACCES", "ESTALE", "EMFILE")
EVERY = [
    *itertools.product(("scandir", "stat"), (*OS_ERRORS, "MemoryError"), (1, 2, 3, 5, 8, 20)),
    *itertools.product(
        ("commit", "connect", "execute"), ("OperationalError", "MemoryError"), (1, 2, 3, 4, 5, 8, 13, 21)
    ),
]
SHARE = [("scandir", "EIO", 3), ("commit", "OperationalError", 4)]


@pytest.mark.parametrize(("call", "error", "nth"), EVERY if CRASH_N else SHARE)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"] if CRASH_N else ["sqlite"])
def test_the_nth_call_fails(
    new_place: Callable[[str], Place],
    undisturbed: dict[str, tuple[Any, ...]],
    kind: str,
    call: str,
    error: str,
    nth: int,
) -> None:
    """The daemon survives it, or ends and is started again as systemd would: both are fine, a lost file is not."""
    place = new_place(kind)
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2"}
    daemon = place.start(**env, TEST_FAULT=f"{call}:{error}:{nth}")
    deadline = time.monotonic() + 15
    while daemon.poll() is None and place.rows() != undisturbed and time.monotonic() < deadline:
        time.sleep(0.1)
    if place.rows() != undisturbed:
        if daemon.poll() is None:
            place.stop(daemon)
        daemon = place.start(**env)
    place.wait(lambda: place.rows() == undisturbed, daemon)
    if daemon.poll() is None:
        assert place.stop(daemon) == 0
    assert "Traceback" not in place.log
    place.check(undisturbed)


def test_an_unreadable_file_is_read_once_it_can_be(new_place: Callable[[str], Place]) -> None:
    place = new_place("sqlite")
    (place.incoming / "cut.png").write_bytes((place.incoming / "0" / "0.png").read_bytes()[:150])
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="100")
    place.wait(lambda: place.rows().get("cut.png", ("",))[0] == "retry", daemon)
    assert place.rows()["cut.png"][3] == "truncated"
    film(place.incoming / "cut.png", 77)
    place.wait(lambda: place.rows()["cut.png"][0] == "done", daemon)
    assert place.stop(daemon) == 0


def test_a_postgres_that_goes_away_and_comes_back(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], postgres_url: str
) -> None:
    """Its back-ends are terminated again and again while films come in."""
    place = new_place("postgres")
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1", TEST_SLOW_S="0.2", CXRBATCH_BATCH_SIZE="2")
    name = place.url.rpartition("/")[2].partition("?")[0]
    for extra in range(10 if CRASH_N == 0 else 60):
        film(place.incoming / "more" / f"{extra}.png", 3000 + extra)
        place.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{name}' AND pid <> pg_backend_pid()"
        )
        time.sleep(0.5)
    place.wait(place.settled, daemon)
    assert place.stop(daemon) == 0
    rows = place.rows()
    assert undisturbed.items() <= rows.items()
    place.check(rows)


def test_postgres_stopped_for_a_while(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], own_postgres: OwnPostgres
) -> None:
    """Killed, away, started again: no loss, hardly a line of log, memory as before."""
    place = new_place("sqlite")
    place.url = own_postgres.url
    assert place.run("upgrade", command="db") == 0
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1", CXRBATCH_LEASE_S="5")
    place.wait(place.settled, daemon)
    own_postgres.kill()
    lines, memory = place.log.count("\n"), psutil.Process(daemon.pid).memory_info().rss
    for extra in range(20):
        film(place.incoming / "more" / f"{extra}.png", 4000 + extra)
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
    """The daemon waits; once there is room again, everything gets its row."""
    place = new_place("sqlite")
    disk = place.cwd / "disk"
    with small_disk(disk):
        place.url = f"sqlite:///{disk}/store.db"
        assert place.run("upgrade", command="db") == 0
        ballast = disk / "ballast"
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1")
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
    """What is left is an empty mount point, which is not an empty folder."""
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
        film(behind / "meanwhile.png", 5)
        bind(behind, share)
        place.wait(lambda: "folder_back" in place.log and "meanwhile.png" in place.rows() and place.settled(), daemon)
        assert place.stop(daemon) == 0
        rows = place.rows()
        assert undisturbed.items() <= rows.items()
        assert not place.ask("SELECT 1 FROM audit WHERE event IN ('missing', 'returned')")
        place.check(rows)
    finally:
        unmount(share)


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
