"""kill -9 of the whole process group at random moments, again and again, and of the parent alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from road import film
from watching import CRASH_N, PATIENCE_S, Place, kill_group

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize(("kind", "kills"), [("sqlite", CRASH_N or 3), ("postgres", CRASH_N // 5 or 1)])
def test_random_kills(new_place: Callable[[str], Place], kind: str, kills: int) -> None:
    """One store and one folder, new films before each life. After each kill nothing half-made is left or runs on; after
    every 25 the store is compared with the folder, and at the end with an undisturbed run over it."""
    seed = int(os.environ.get("CXRBATCH_SEED", "20261122"))
    chance = random.Random(seed)
    place = new_place(kind)
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2", "TEST_SLOW_S": "0.05"}
    life_s, films, at_work, looked = 3.0, 0, 0, 0
    for kill in range(1, kills + 1):
        for _ in range(chance.randint(1, 5)):
            films += 1
            film(place.incoming / f"more {films // 200}" / f"{films}.png", 1000 + chance.randrange(films + 1))
        daemon = place.start(**env)
        time.sleep(chance.uniform(0, life_s))
        if chance.random() < 0.3:
            daemon.send_signal(signal.SIGKILL)  # the parent alone: its workers notice
            assert daemon.wait(PATIENCE_S) == -9
        else:
            kill_group(daemon)
        assert not list(place.incoming.rglob(".*"))
        place.no_orphans()
        place.started.clear()
        if kill % 5 == 0:  # not always: who looks repairs the journal, and that is the next life's business
            looked += 1
            at_work += bool(place.ask("SELECT 1 FROM files WHERE state IN ('waiting', 'claimed')"))
        if kill % 25 == 0 or kill == kills:
            began, ready = time.monotonic(), place.log.count(" ready ")
            daemon = place.start(**env)
            place.wait(lambda before=ready: place.log.count(" ready ") > before and place.settled(), daemon)  # type: ignore[misc]
            life_s = min(6.0, max(2.0, time.monotonic() - began))  # what a life takes, on this machine as busy as it is
            assert place.stop(daemon) == 0
            place.check(place.rows())
            print(f"{kill} kills on {kind}, {len(place.rows())} files; a life takes {life_s:.1f} s", flush=True)
    place.check(place.undisturbed())
    print(f"{kills} kills on {kind}, seed {seed}, {films} films; {at_work} of {looked} lives were cut in their work")
