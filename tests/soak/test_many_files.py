"""Very many files waiting at the start of the daemon, then a burst: memory stays bounded, every file gets a row."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from factories import make_bundle
from pipelines import image
from watchers import SOAK_N, Place

pytestmark = pytest.mark.soak


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"), forked=False)
    yield made
    made.clean_up()


def numbered(png: bytes, number: int) -> bytes:
    """The same image as another content: with a numbered text chunk after the header."""
    chunk = b"tEXtnumber\0" + str(number).encode()
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@pytest.mark.timeout(28_800)
def test_waiting_files_and_a_burst(place: Place, tmp_path: Path) -> None:
    """No two files have the same content, so that each is scored."""
    waiting = SOAK_N or 1000
    burst = waiting // 5
    images = [image(tmp_path / "images" / f"{seed}.png", seed).read_bytes() for seed in range(50)]

    def write(folder: Path, numbers: range) -> None:
        for i in numbers:
            if i % 1000 == 0:
                (folder / f"{i // 1000}").mkdir(parents=True)
            path = folder / f"{i // 1000}" / f"a name as long as they are {i:07}.png"
            path.write_bytes(numbered(images[i % len(images)], i))

    write(place.incoming / "waiting", range(waiting))
    write(tmp_path / "burst", range(waiting, waiting + burst))
    coming = sorted(path for path in (tmp_path / "burst").rglob("*.png"))
    time.sleep(2)
    daemon = place.start(CXRBATCH_BATCH_SIZE="32", CXRBATCH_RESCAN_S="30", CXRBATCH_WORKERS="2" if SOAK_N else "1")
    place.wait(lambda: " ready " in place.log, daemon)
    ready = time.monotonic()
    process = psutil.Process(daemon.pid)
    idle = process.memory_info().rss
    place.wait(lambda: bool(place.ask("SELECT 1 FROM files WHERE state = 'done' LIMIT 1")), daemon)
    first_row_s, peak = time.monotonic() - ready, idle
    done = "SELECT count(*) FROM files WHERE state = 'done'"
    deadline = time.monotonic() + 600 + waiting / 10
    burst_s = 0.0
    while (count := place.ask(done)[0][0]) < waiting + burst:
        assert daemon.poll() is None and time.monotonic() < deadline, (count, place.log[-2000:])
        peak = max(peak, process.memory_info().rss)
        if count > waiting // 2 and not burst_s:
            began = time.monotonic()
            for folder in {path.parent for path in coming}:
                (place.incoming / "burst" / folder.name).mkdir(parents=True)
            for path in coming:
                path.rename(place.incoming / "burst" / path.parent.name / path.name)
            burst_s = time.monotonic() - began
        time.sleep(2.0 if SOAK_N else 0.25)
    seconds, used = time.monotonic() - ready, process.cpu_times()
    print(
        f"{waiting} waiting, {burst} in {burst_s:.1f} s: first row after {first_row_s:.1f} s, all in {seconds:.0f} s, "
        f"RSS {idle / 2**20:.0f} MiB + {(peak - idle) / 2**20:.0f} MiB; CPU of the daemon "
        f"{used.user + used.system:.0f} s, of its decoders {children_cpu_s(process):.0f} s"
    )
    assert place.stop(daemon) == 0
    assert place.ask("SELECT count(*) FROM files") == place.ask("SELECT count(*) FROM predictions")
    assert place.ask("SELECT count(*) FROM files")[0][0] == waiting + burst
    assert place.ask("PRAGMA integrity_check") == [("ok",)]
    assert peak - idle < 100 * 2**20
    place.no_orphans()


def children_cpu_s(process: psutil.Process) -> float:
    """User and system seconds of all children, including ended ones."""
    ended, live = process.cpu_times(), [child.cpu_times() for child in process.children(recursive=True)]
    return ended.children_user + ended.children_system + sum(times.user + times.system for times in live)
