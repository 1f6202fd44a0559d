"""kill -9 of the whole process group at random moments, again and again, and of the parent alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from road import film
from watching import CRASH_N, PATIENCE_S, Place, kill_group

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "kills"), [("sqlite", CRASH_N or 3), ("postgres", CRASH_N // 5 or 1)])
def test_random_kills(
    new_place: Callable[[str], Place], undisturbed: dict[str, tuple[Any, ...]], kind: str, kills: int
) -> None:
    """New films come in all the while; after every 25 kills the store is compared with the folder."""
    seed = int(os.environ.get("CXRBATCH_SEED", "20261122"))
    chance = random.Random(seed)
    place = new_place(kind)
    env = {"CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2", "CXRBATCH_LEASE_S": "2", "TEST_SLOW_S": "0.05"}
    expected = dict(undisturbed)
    for kill in range(1, kills + 1):
        daemon = place.start(**env)
        for extra in range(2):
            film(place.incoming / "more" / f"{kill}-{extra}.png", 1000 + chance.randrange(40))
        time.sleep(chance.uniform(0.3, 5.0))
        if chance.random() < 0.3:
            daemon.send_signal(signal.SIGKILL)  # the parent alone: its workers notice
            daemon.wait(PATIENCE_S)
        else:
            kill_group(daemon)
        place.no_orphans()
        place.started.clear()
        if kill % 25 == 0 or kill == kills:
            daemon = place.start(**env)
            place.wait(place.settled, daemon)
            assert place.stop(daemon) == 0
            rows = place.rows()
            assert expected.items() <= rows.items(), (seed, kill)
            by_content = {row[4]: row for row in rows.values()}
            assert all(row == by_content[row[4]] for row in rows.values() if row[0] == "done"), (seed, kill)
            place.check(rows)
