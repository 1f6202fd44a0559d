"""Several daemons on one Postgres: each image is scored once; outcomes of a daemon with expired leases are dropped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from pipelines import image
from watchers import CRASH_N, Place

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

ENV = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2"}


@pytest.mark.parametrize("daemons", [2, 4] if CRASH_N else [2])
def test_daemons_share_the_work_and_a_killed_one_is_replaced(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], daemons: int
) -> None:
    place = new_place("postgres")
    for extra in range(20):
        image(place.incoming / "more" / f"{extra}.png", 2000 + extra)
    started = [place.start(**ENV, CXRBATCH_LEASE_S="3", TEST_SLOW_S="0.1") for _ in range(daemons)]
    place.wait(lambda: len(place.ask("SELECT DISTINCT run_id FROM files WHERE state = 'done'")) == daemons)
    os.killpg(started[0].pid, signal.SIGKILL)
    started[0].wait()
    place.wait(place.settled, started[1])
    for daemon in started[1:]:
        assert place.stop(daemon) == 0
    rows = place.rows()
    assert undisturbed.items() <= rows.items()
    place.check(rows)
    scored = place.ask("SELECT count(*) FROM predictions")[0][0]
    assert scored == len({row[4] for row in rows.values() if row[0] == "done"})


def test_one_that_was_frozen_past_its_lease_wakes_and_loses(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    place = new_place("postgres")
    frozen = place.start(**ENV, CXRBATCH_LEASE_S="2", TEST_SLOW_S="3")
    place.wait(lambda: bool(place.ask("SELECT 1 FROM files WHERE state = 'claimed'")), frozen)
    (owner,) = {row[0] for row in place.ask("SELECT lease_owner FROM files WHERE state = 'claimed'")}
    os.killpg(frozen.pid, signal.SIGSTOP)
    # What it had committed stays; the other daemon does the rest.
    kept = {name for name, row in place.rows().items() if row[0] in ("done", "rejected")}
    other = place.start(**ENV, CXRBATCH_LEASE_S="60")
    place.wait(place.settled, other)
    assert place.rows() == undisturbed
    by_whom = place.ask("SELECT path, run_id, processed_at FROM files ORDER BY path")
    os.killpg(frozen.pid, signal.SIGCONT)
    time.sleep(4)  # long enough to finish its current batch
    assert place.ask("SELECT path, run_id, processed_at FROM files ORDER BY path") == by_whom
    assert len({run for _, run, _ in by_whom}) == (2 if kept else 1)
    for daemon in (frozen, other):
        assert place.stop(daemon) == 0
    assert owner not in {row[0] for row in place.ask("SELECT lease_owner FROM files")}
    place.check(undisturbed)


@pytest.mark.parametrize("point", ["offer.before_commit", "claim.before_commit", "record.before_commit"])
def test_one_that_is_frozen_inside_a_transaction_stops_nobody(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], point: str
) -> None:
    place = new_place("postgres")
    frozen = place.start(**ENV, CXRBATCH_LEASE_S="2", TEST_FROZEN_S="3", CXRBATCH_FAILPOINT=f"{point}:1:SIGSTOP")
    place.wait(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED, frozen)
    other = place.start(**ENV, CXRBATCH_LEASE_S="60")
    place.wait(place.settled, other)
    assert place.rows() == undisturbed
    scored = place.ask("SELECT id, run_id, processed_at FROM predictions ORDER BY id")
    os.killpg(frozen.pid, signal.SIGCONT)
    time.sleep(4)  # its transaction is lost; it may read again what it had found, and scores nothing again
    place.wait(place.settled, other)
    assert place.ask("SELECT id, run_id, processed_at FROM predictions ORDER BY id") == scored
    for daemon in (frozen, other):
        assert place.stop(daemon) == 0
    place.check(undisturbed)
