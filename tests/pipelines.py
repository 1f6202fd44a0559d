"""Running the real command as a user does, and small images to run it on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from PIL import Image

from cxrbatch.store.connection import parse_url
from fork_server import LIMIT_S, Daemon, fork_server

#: One commit per batch of 8, so that a scan of small images can be killed in the middle.
_PLAN = {"CXRBATCH_QUIET_S": "0", "CXRBATCH_RECORD_AGE_S": "0", "CXRBATCH_BATCH_SIZE": "8"}


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self.out.splitlines()[-1]))


@dataclass(frozen=True)
class Pipeline:
    """`cxrbatch` in a working folder, with a store and an untrained cascade."""

    cwd: Path
    url: str
    bundle: Path

    def start(self, *args: object, **env: str) -> Daemon:
        """The command with its real engine, in its own process group."""
        plan = {**os.environ, **_PLAN, "CXRBATCH_CASCADE": str(self.bundle), **env}
        return fork_server().start(["--db", self.url, *map(str, args)], self.cwd, plan)

    def run(self, *args: object, **env: str) -> Run:
        process = self.start(*args, **env)
        out, err = process.communicate(LIMIT_S)
        return Run(process.wait(), out, err)

    def ask(self, query: str) -> list[Any]:
        """Rows of a query over the store."""
        engine = sa.create_engine(parse_url(self.url))
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query))]
        finally:
            engine.dispose()

    def wait_until(self, condition: Callable[[], bool], process: Daemon) -> None:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and process.poll() is None:
            if condition():
                return
            time.sleep(0.02)
        if not condition():
            process.kill()
            raise AssertionError(process.communicate())

    def rows(self) -> int:
        try:
            return int(self.ask("SELECT count(*) FROM files")[0][0])
        except sa.exc.DBAPIError:  # not there yet
            return 0


def image(path: Path, seed: int, side: int = 48) -> Path:
    """A small grey PNG, different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((side, side)))
    Image.fromarray(smooth).save(path)
    old = time.time() - 60
    os.utime(path, (old, old))
    return path


def kill_group(process: Daemon) -> None:
    """kill -9 for the process and every child."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT_S)
