"""Very many files waiting when the daemon starts, and then a burst into the live one: memory stays, all rows come."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from making import make_bundle
from road import film
from watching import SOAK_N, Place

pytestmark = pytest.mark.soak


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"))
    yield made
    made.clean_up()


@pytest.mark.timeout(14_400)
def test_waiting_files_and_a_burst(place: Place, tmp_path: Path) -> None:
    waiting = SOAK_N or 1000
    burst = waiting // 5
    contents = [film(tmp_path / "contents" / f"{seed}.png", seed) for seed in range(50)]

    def links(folder: Path, number: int) -> None:
        for i in range(number):
            if i % 1000 == 0:
                (folder / f"{i // 1000}").mkdir(parents=True)
            os.link(contents[i % len(contents)], folder / f"{i // 1000}" / f"a name as long as they are {i:07}.png")

    links(place.incoming / "waiting", waiting)
    daemon = place.start(CXRBATCH_BATCH_SIZE="32", CXRBATCH_RESCAN_S="30")
    place.wait(lambda: " ready " in place.log, daemon)
    ready = time.monotonic()
    process = psutil.Process(daemon.pid)
    idle = process.memory_info().rss
    place.wait(lambda: bool(place.ask("SELECT 1 FROM files WHERE state = 'done' LIMIT 1")), daemon)
    first_row_s, peak = time.monotonic() - ready, idle
    done = "SELECT count(*) FROM files WHERE state = 'done'"
    deadline = time.monotonic() + 60 + waiting / 10
    burst_s = 0.0
    while (count := place.ask(done)[0][0]) < waiting + burst:
        assert daemon.poll() is None and time.monotonic() < deadline, (count, place.log[-2000:])
        peak = max(peak, process.memory_info().rss)
        if count > waiting // 2 and not burst_s:
            began = time.monotonic()
            links(place.incoming / "burst", burst)
            burst_s = time.monotonic() - began
        time.sleep(0.5)
    seconds = time.monotonic() - ready
    print(
        f"{waiting} waiting, {burst} in {burst_s:.1f} s: first row after {first_row_s:.1f} s, all in {seconds:.0f} s, "
        f"RSS {idle / 2**20:.0f} MiB + {(peak - idle) / 2**20:.0f} MiB"
    )
    assert place.stop(daemon) == 0
    assert place.ask("SELECT count(*) FROM files")[0][0] == waiting + burst
    assert place.ask("SELECT count(*) FROM predictions")[0][0] == len(contents)
    assert peak - idle < 100 * 2**20
    place.no_orphans()
