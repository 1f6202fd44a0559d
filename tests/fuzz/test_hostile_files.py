"""Mutated images of every format and hostile files: a daemon gives each one row and keeps running.

Seeds are the synthetic samples; a mutation is named by CXRBATCH_SEED and its number, and is made again from these.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cxrbatch.samples import write_samples
from factories import make_bundle
from watchers import FUZZ_N, Place

pytestmark = pytest.mark.fuzz

SEED = int(os.environ.get("CXRBATCH_SEED", "20261122"))
#: Mutations that once crashed a decoder or took too long: (seed, number). They are part of every run.
CRASHERS: list[tuple[int, int]] = []
TIMEOUT_S = 20.0


def mutation(seed: int, number: int, images: list[Path]) -> tuple[str, bytes]:
    """A name and the bytes of one mutation; always the same for the same seed and number."""
    chance = random.Random(f"{seed}:{number}")
    image = chance.choice(images)
    return f"{seed}-{number:06}{image.suffix}", mutated(image.read_bytes(), chance)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: flipped, cut, doubled, moved, overwritten with difficult numbers."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not changed:
            break
        # Readers depend on headers most: half of all changes go to the first kilobyte.
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
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", make_bundle(tmp_path / "bundle"), forked=False)
    yield made
    made.clean_up()


@pytest.mark.timeout(14_400)
def test_mutated_files_are_one_row_each_and_the_daemon_lives(place: Place, tmp_path: Path) -> None:
    number = FUZZ_N or 60
    write_samples(tmp_path / "samples")
    images = sorted(path for path in (tmp_path / "samples").rglob("*") if path.is_file() and path.stat().st_size < 3e6)
    daemon = place.start(
        CXRBATCH_TRUNCATED_TRIES="1",
        CXRBATCH_DECODE_TIMEOUT_S=str(TIMEOUT_S),
        CXRBATCH_WORKER_MEMORY_MIB="1024",
        CXRBATCH_WORKERS="2" if FUZZ_N else "1",
        TEST_TIMES=str(tmp_path / "times"),
    )
    (place.incoming / "first").write_bytes(b"not an image")
    place.wait(place.settled, daemon)
    process, peak, started = psutil.Process(daemon.pid), 0, time.monotonic()
    idle = process.memory_info().rss
    names = [*CRASHERS, *((SEED, i) for i in range(number))]
    settled = "SELECT count(*) FROM files WHERE state IN ('done', 'rejected')"
    for first in range(0, len(names), 500):
        some = names[first : first + 500]
        for seed, i in some:
            name, data = mutation(seed, i, images)
            (place.incoming / name).write_bytes(data)
        deadline = time.monotonic() + 1000
        while place.ask(settled)[0][0] < 1 + first + len(some):
            assert daemon.poll() is None, place.log[-3000:]
            assert time.monotonic() < deadline
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.25)
    seconds = time.monotonic() - started
    rows = place.rows()
    reasons = Counter(row[3] for row in rows.values())
    crashers = [name for name, row in rows.items() if row[3] in ("decoder_crashed", "decode_timeout")]
    walls, cpus = zip(*(map(float, line.split()[:2]) for line in (tmp_path / "times").open()), strict=True)
    p99, cpu_p99 = (sorted(times)[int(0.99 * len(times))] for times in (walls, cpus))
    print(
        f"{len(names)} files, seed {SEED}, {seconds:.0f} s, RSS {idle / 2**20:.0f} +{(peak - idle) / 2**20:.0f} MiB; "
        f"a file: p99 {p99:.3f} s (CPU {cpu_p99:.3f}), longest {max(walls):.2f} s (CPU {max(cpus):.2f}), "
        f"limit {TIMEOUT_S:.0f} s; {dict(reasons)}; crashers {crashers}"
    )
    assert place.stop(daemon) == 0
    place.check(rows)
    assert rows.keys() == {"first", *(mutation(seed, i, images)[0] for seed, i in names)}
    assert {row[0] for row in rows.values()} <= {"done", "rejected"}
    assert "Traceback" not in place.log and "uncaught" not in place.log
    assert peak - idle < 64 * 2**20
