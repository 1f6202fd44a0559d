"""Run daemons, and check their stores afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from cxrbatch.store.connection import parse_url
from fork_server import LIMIT_S, Daemon, fork_server

HERE = Path(__file__).parent
#: How much to run: 0 is the share of a plain `pytest` (see the Makefile).
CRASH_N, FUZZ_N, SOAK_N = (int(os.environ.get(f"CXRBATCH_{kind}_N", "0")) for kind in ("CRASH", "FUZZ", "SOAK"))
WAIT_LIMIT_S = LIMIT_S


Process = subprocess.Popen[str] | Daemon


@dataclass
class Place:
    """A folder to watch, a store, and the daemons that were started on them."""

    cwd: Path
    url: str
    bundle: Path
    options: tuple[str, ...] = ()  # before the command
    forked: bool = True  # by the fork server; False: a new interpreter
    started: list[Process] = field(default_factory=list)

    watched: Path | None = None  # None: its own folder

    @property
    def incoming(self) -> Path:
        folder = self.watched or self.cwd / "in"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *args: object, command: str = "watch", **env: str) -> Process:
        """Start `cxrbatch watch in …` in its own process group; its log goes to log.txt."""
        given = list(map(str, args)) if command != "watch" else [str(self.incoming), *map(str, args)]
        plan = {
            "CXRBATCH_CASCADE": str(self.bundle),
            "CXRBATCH_QUIET_S": "0.2",
            "CXRBATCH_RESCAN_S": "1",
            "CXRBATCH_WORKERS": "1",
            "CXRBATCH_RECORD_AGE_S": "0",  # a commit a batch: more places to be killed at
            "CXRBATCH_RETRY_FIRST_S": "1",
            "CXRBATCH_RETRY_MOST_S": "2",
            "PYTHONPATH": f"{HERE.parent}:{HERE}",
            "TEST_ENGINE": "arithmetic",
        }
        store = ["--db", self.url] if self.url else []
        options, env = [*store, *self.options, command, *given], {**os.environ, **plan, **env}
        if self.forked:
            log_file = self.cwd / "log.txt"
            process: Process = fork_server().start(options, self.cwd, env, out=log_file, err=log_file)
        else:
            with open(self.cwd / "log.txt", "a") as log:
                program = [sys.executable, str(HERE / "daemon.py"), *options]
                process = subprocess.Popen(
                    program, cwd=self.cwd, env=env, stdout=log, stderr=log, text=True, start_new_session=True
                )
        self.started.append(process)
        return process

    def run(self, *args: object, command: str = "watch", **env: str) -> int:
        """The same, until it ends; returns the exit code."""
        return self.start(*args, command=command, **env).wait(WAIT_LIMIT_S)

    @property
    def log(self) -> str:
        path = self.cwd / "log.txt"
        return path.read_text() if path.exists() else ""

    def ask(self, query: str) -> list[Any]:
        """Rows of a query; none while the store does not exist."""
        try:
            with engine_of(self.url).connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query))]
        except sa.exc.DBAPIError:
            return []

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """State, label, confidence, reason and content of every existing file, by name below the folder."""
        found = self.ask(
            "SELECT f.path, f.state, f.label, f.confidence, f.reason_code, i.sha256 FROM files f"
            " LEFT JOIN images i ON i.id = f.image_id WHERE f.state <> 'missing'"
        )
        return {os.path.relpath(path, self.incoming): tuple(rest) for path, *rest in found}

    def settled(self) -> bool:
        """Whether every existing file has its outcome."""
        rows = self.rows()
        return rows.keys() == self.files() and not {row[0] for row in rows.values()} & {"waiting", "claimed"}

    def files(self) -> set[str]:
        """Names below the folder that are included."""
        found = (path for path in self.incoming.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {str(path.relative_to(self.incoming)) for path in found}

    def wait(self, condition: Callable[[], bool], process: Process | None = None) -> None:
        """Wait until it is true; fails with the log if the process ends first, or after WAIT_LIMIT_S."""
        deadline = time.monotonic() + WAIT_LIMIT_S
        while not condition():
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                assert condition(), (process and process.poll(), self.rows(), self.log[-3000:])
                return
            time.sleep(0.25)

    def stop(self, process: Process, signum: int = signal.SIGTERM) -> int:
        """Send a signal to the daemon alone and wait for its end."""
        process.send_signal(signum)
        return process.wait(WAIT_LIMIT_S)

    def check(self, expected: dict[str, tuple[Any, ...]]) -> None:
        """At the end: rows == files, values as in an undisturbed run, no leftovers, a sound store."""
        assert self.rows() == expected
        assert not self.ask("SELECT path FROM files WHERE lease_owner IS NOT NULL")
        doubles = "SELECT image_id, cascade_id FROM predictions GROUP BY image_id, cascade_id HAVING count(*) > 1"
        assert not self.ask(doubles)
        if self.url.startswith("sqlite"):
            assert self.ask("PRAGMA integrity_check") == [("ok",)]
        assert not list(self.incoming.rglob(".*"))
        self.no_orphans()

    def undisturbed(self) -> dict[str, tuple[Any, ...]]:
        """The rows of an undisturbed run over the folder as it is now, in a separate store."""
        folder = self.cwd / "undisturbed"
        folder.mkdir()
        calm = Place(folder, f"sqlite:///{folder}/store.db", self.bundle)
        calm.watched = self.incoming
        assert calm.run("--once", CXRBATCH_TRUNCATED_TRIES="1", CXRBATCH_BATCH_SIZE="32") in (0, 3), calm.log[-3000:]
        return calm.rows()

    def no_orphans(self) -> None:
        """Check that no process of ended daemons is still running."""
        groups = {process.pid for process in self.started if process.poll() is not None}
        deadline = time.monotonic() + WAIT_LIMIT_S
        while left := of_groups(groups):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def clean_up(self) -> None:
        for process in self.started:
            kill_group(process)


@lru_cache(maxsize=8)
def engine_of(url: str) -> sa.Engine:
    """One engine per store: creating one costs more than a query."""
    return sa.create_engine(parse_url(url), poolclass=sa.NullPool)


def of_groups(groups: set[int]) -> list[psutil.Process]:
    """The live processes of these process groups."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_group(process: Process) -> None:
    """kill -9 for a daemon and all its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(WAIT_LIMIT_S)


def some_files(folder: Path, images: int = 12) -> None:
    """Write images, two names for one content, junk, an empty file and a truncated one."""
    from pipelines import image

    for seed in range(images):
        image(folder / f"{seed % 3}" / f"{seed}.png", seed)
    (folder / "same.png").write_bytes((folder / "0" / "0.png").read_bytes())
    (folder / "junk.dcm").write_text("<html>not an image</html>")
    (folder / "half.png").write_bytes((folder / "1" / "1.png").read_bytes()[:200])
    for name in ("same.png", "junk.dcm", "half.png"):
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))


def names(paths: Sequence[Path]) -> set[str]:
    return {path.name for path in paths}
