"""kill -9 of the whole process group at random moments, again and again, and of the parent alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from pipelines import image
from watchers import CRASH_N, WAIT_LIMIT_S, Place, kill_group

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize(("kind", "kills"), [("sqlite", CRASH_N or 3), ("postgres", CRASH_N // 5 or 1)])
def test_random_kills(new_place: Callable[[str], Place], kind: str, kills: int) -> None:
    """One store and one folder, new images before each start. No kill leaves a partial file or a running process.

    Every 25 kills the store is compared with the folder, and at the end with an undisturbed run over it.
    """
    seed = int(os.environ.get("CXRBATCH_SEED", "20261122"))
    chance = random.Random(seed)
    place = new_place(kind)
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2", "TEST_SLOW_S": "0.05"}
    daemon_s, images, at_work, looked = 3.0, 0, 0, 0
    for kill in range(1, kills + 1):
        for _ in range(chance.randint(1, 5)):
            images += 1
            image(place.incoming / f"more {images // 200}" / f"{images}.png", 1000 + chance.randrange(images + 1))
        daemon = place.start(**env)
        time.sleep(chance.uniform(0, daemon_s))
        if chance.random() < 0.3:
            daemon.send_signal(signal.SIGKILL)  # the parent alone: its workers notice
            assert daemon.wait(WAIT_LIMIT_S) == -9
        else:
            kill_group(daemon)
        assert not list(place.incoming.rglob(".*"))
        place.no_orphans()
        place.started.clear()
        if kill % 5 == 0:  # not always: opening the store repairs the journal, which the next daemon must be able to do
            looked += 1
            at_work += bool(place.ask("SELECT 1 FROM files WHERE state IN ('waiting', 'claimed')"))
        if kill % 25 == 0 or kill == kills:
            began, ready = time.monotonic(), place.log.count(" ready ")
            daemon = place.start(**env)
            place.wait(lambda before=ready: place.log.count(" ready ") > before and place.settled(), daemon)  # type: ignore[misc]
            daemon_s = min(
                6.0, max(2.0, time.monotonic() - began)
            )  # the run time of a daemon at the current load of this machine
            assert place.stop(daemon) == 0
            place.check(place.rows())
            print(f"{kill} kills on {kind}, {len(place.rows())} files; a daemon runs {daemon_s:.1f} s", flush=True)
    place.check(place.undisturbed())
    print(f"{kills} kills on {kind}, seed {seed}, {images} images; {at_work} of {looked} daemons were killed at work")
