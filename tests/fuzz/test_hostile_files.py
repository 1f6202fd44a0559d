"""Mutated films of every format and hostile files, thrown at a daemon: one row each, and it lives on.

Seeds are the synthetic samples; a mutation is named by CXRBATCH_SEED and its number, and can be made again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cxrbatch.samples import write_samples
from making import make_bundle
from watching import FUZZ_N, Place

pytestmark = pytest.mark.fuzz

SEED = int(os.environ.get("CXRBATCH_SEED", "20261122"))
KEPT = Path(os.environ.get("CXRBATCH_KEEP_CRASHERS", "/tmp/cxrbatch-crashers"))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: flipped, cut, doubled, moved, overwritten with numbers that readers stumble over."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not changed:
            break
        # Headers are where readers decide: half of all changes go to the first kilobyte.
        top = min(len(changed), 1024) if chance.random() < 0.5 else len(changed)
        at = chance.randrange(top)
        match chance.randrange(6):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[chance.randrange(len(changed)) :]
            case 2:
                changed[at:at] = changed[at : at + chance.randrange(1, 2000)]
            case 3:
                del changed[at : at + chance.randrange(1, 200)]
            case 4:
                changed[at : at + 4] = chance.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"]
                )
            case 5:
                changed[at : at + 64] = chance.randbytes(64)
    return bytes(changed)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"))
    yield made
    made.clean_up()


@pytest.mark.timeout(7200)
def test_mutated_files_are_one_row_each_and_the_daemon_lives(place: Place, tmp_path: Path) -> None:
    number = FUZZ_N or 60
    write_samples(tmp_path / "samples")
    seeds = sorted(path for path in (tmp_path / "samples").rglob("*") if path.is_file() and path.stat().st_size < 3e6)
    chance = random.Random(SEED)
    daemon = place.start(
        CXRBATCH_TRUNCATED_TRIES="1", CXRBATCH_DECODE_TIMEOUT_S="20", CXRBATCH_WORKER_MEMORY_MIB="1024"
    )
    (place.incoming / "first").write_bytes(b"not a film")
    place.wait(place.settled, daemon)
    process, idle, peak, started = psutil.Process(daemon.pid), 0, 0, time.monotonic()
    idle = process.memory_info().rss
    for round in range(0, number, 500):
        for i in range(round, min(round + 500, number)):
            seed = chance.choice(seeds)
            (place.incoming / f"{i:06}{seed.suffix}").write_bytes(mutated(seed.read_bytes(), chance))
        deadline = time.monotonic() + 1000
        while not place.settled():
            assert daemon.poll() is None, place.log[-3000:]
            assert time.monotonic() < deadline
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.2)
        for path, reason in place.ask("SELECT path, reason_code FROM files WHERE reason_code IS NOT NULL"):
            if reason in ("decoder_crashed", "decode_timeout"):
                KEPT.mkdir(exist_ok=True)
                (KEPT / Path(path).name).write_bytes(Path(path).read_bytes())
    seconds = time.monotonic() - started
    rows = place.rows()
    reasons = {row[3] for row in rows.values()} - {None}
    print(f"{number} files, seed {SEED}, {seconds:.0f} s, RSS +{(peak - idle) / 2**20:.0f} MiB, reasons {reasons}")
    assert place.stop(daemon) == 0
    place.check(rows)
    assert len(rows) == number + 1
    assert {row[0] for row in rows.values()} <= {"done", "rejected"}
    assert "Traceback" not in place.log and "uncaught" not in place.log
    assert peak - idle < 64 * 2**20
