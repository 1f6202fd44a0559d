"""From the close of a file to its committed row, in a running `cxrbatch watch` with the real models."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.inputs import image_paths
from bench.measure import committed

__all__ = ["watch_latency"]

_QUIET_S = 1.0
_GAP_S = 0.25  # on average, between two files


def watch_latency(images: Path, files: int, place: Path) -> dict[str, float]:
    """Drop `files` images one by one; the seconds from each one's close to its row, less quiet_s."""
    incoming, store = place / "incoming", place / "watch.db"
    incoming.mkdir()
    sources = list(image_paths(images, files + 1))
    shutil.copyfile(sources[-1], incoming / "first.jpg")
    command = [sys.executable, "-m", "cxrbatch", "--db", f"sqlite:///{store}", "watch", str(incoming)]
    with (place / "watch.txt").open("w") as log:
        env = {**os.environ, "CXRBATCH_QUIET_S": str(_QUIET_S)}
        daemon = subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        while not committed(store):
            if daemon.poll() is not None:
                raise RuntimeError((place / "watch.txt").read_text())
            time.sleep(0.1)
        waits = _drop(sources[:files], incoming, store)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
    p50, p99 = np.percentile(waits, (50, 99)).tolist()
    return {"files": len(waits), "quiet_s": _QUIET_S, "p50_s": p50, "p99_s": p99, "max_s": max(waits)}


def _drop(sources: list[str], incoming: Path, store: Path) -> list[float]:
    gaps = random.Random(0)
    closed: dict[str, float] = {}
    waits: list[float] = []
    next_drop, left = time.monotonic(), list(sources)
    give_up = time.monotonic() + len(sources) * 2 * _GAP_S + 60
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        while (left or closed) and time.monotonic() < give_up:
            if left and time.monotonic() >= next_drop:
                target = incoming / Path(left[0]).name
                shutil.copyfile(left.pop(0), target)
                closed[str(target)] = time.monotonic()
                next_drop = time.monotonic() + gaps.uniform(0, 2 * _GAP_S)
            rows = connection.execute("SELECT path FROM files WHERE state = 'done' ORDER BY id DESC LIMIT 100")
            now = time.monotonic()
            for (path,) in rows.fetchall():
                if path in closed:
                    waits.append(now - closed.pop(path) - _QUIET_S)
            time.sleep(0.01)
    if left or closed:  # the longest waits of all: percentiles without them would flatter
        raise RuntimeError(f"{len(left) + len(closed)} of {len(sources)} files had no row in time")
    return waits
