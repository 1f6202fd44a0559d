"""Daemons to watch with, and what has to be true of their stores afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from cxrbatch.store.engine import parse_url
from nursery import Life, Nursery

HERE = Path(__file__).parent
#: How much to run: 0 is the share of a plain `pytest` (see the Makefile).
CRASH_N, FUZZ_N, SOAK_N = (int(os.environ.get(f"CXRBATCH_{kind}_N", "0")) for kind in ("CRASH", "FUZZ", "SOAK"))
#: Machines may be busy: no test waits so long unless something is wrong.
PATIENCE_S = 400.0 if CRASH_N or FUZZ_N or SOAK_N else 100.0


Process = subprocess.Popen[str] | Life


@cache
def nursery() -> Nursery:
    return Nursery(HERE / "daemon.py", {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"})


@dataclass
class Place:
    """A folder to watch, a store, and the daemons that were started on them."""

    cwd: Path
    url: str
    bundle: Path
    options: tuple[str, ...] = ()  # before the command
    forked: bool = True  # from the nursery; False: a new interpreter
    started: list[Process] = field(default_factory=list)

    watched: Path | None = None  # None: a folder of its own

    @property
    def incoming(self) -> Path:
        folder = self.watched or self.cwd / "in"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, *args: object, command: str = "watch", **env: str) -> Process:
        """`cxrbatch watch in …` in a process group of its own; its log goes to log.txt."""
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
        }
        store = ["--db", self.url] if self.url else []
        options, env = [*store, *self.options, command, *given], {**os.environ, **plan, **env}
        if self.forked:
            process: Process = nursery().start(options, self.cwd, env, self.cwd / "log.txt")
        else:
            with open(self.cwd / "log.txt", "a") as log:
                program = [sys.executable, str(HERE / "daemon.py"), *options]
                process = subprocess.Popen(
                    program, cwd=self.cwd, env=env, stdout=log, stderr=log, text=True, start_new_session=True
                )
        self.started.append(process)
        return process

    def run(self, *args: object, command: str = "watch", **env: str) -> int:
        """The same, to its end; returns the exit code."""
        return self.start(*args, command=command, **env).wait(PATIENCE_S)

    @property
    def log(self) -> str:
        path = self.cwd / "log.txt"
        return path.read_text() if path.exists() else ""

    def ask(self, query: str) -> list[Any]:
        """Rows of a query; none while the store is not there."""
        try:
            with engine_of(self.url).connect() as connection:
                return [tuple(row) for row in connection.execute(sa.text(query))]
        except sa.exc.DBAPIError:
            return []

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """By name below the folder: state, label, confidence, reason and content of everything that is there."""
        found = self.ask(
            "SELECT f.path, f.state, f.label, f.confidence, f.reason_code, i.sha256 FROM files f"
            " LEFT JOIN images i ON i.id = f.image_id WHERE f.state <> 'missing'"
        )
        return {os.path.relpath(path, self.incoming): tuple(rest) for path, *rest in found}

    def settled(self) -> bool:
        """Every file that is there has its outcome."""
        rows = self.rows()
        return rows.keys() == self.files() and not {row[0] for row in rows.values()} & {"waiting", "claimed"}

    def files(self) -> set[str]:
        """Names below the folder that count."""
        found = (path for path in self.incoming.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {str(path.relative_to(self.incoming)) for path in found}

    def wait(self, condition: Callable[[], bool], process: Process | None = None) -> None:
        """Until it is true; fails with the log when the process ends first, or after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                assert condition(), (process and process.poll(), self.rows(), self.log[-3000:])
                return
            time.sleep(0.25)

    def stop(self, process: Process, signum: int = signal.SIGTERM) -> int:
        """Send a signal to the daemon alone and wait for its end."""
        process.send_signal(signum)
        return process.wait(PATIENCE_S)

    def check(self, expected: dict[str, tuple[Any, ...]]) -> None:
        """After everything: rows == files, values as in an undisturbed run, nothing left over, a sound store."""
        assert self.rows() == expected
        assert not self.ask("SELECT path FROM files WHERE lease_owner IS NOT NULL")
        doubles = "SELECT image_id, cascade_id FROM predictions GROUP BY image_id, cascade_id HAVING count(*) > 1"
        assert not self.ask(doubles)
        if self.url.startswith("sqlite"):
            assert self.ask("PRAGMA integrity_check") == [("ok",)]
        assert not list(self.incoming.rglob(".*"))
        self.no_orphans()

    def undisturbed(self) -> dict[str, tuple[Any, ...]]:
        """The rows that a run gives that nobody disturbs, over the folder as it is now, in a store of its own."""
        folder = self.cwd / "undisturbed"
        folder.mkdir()
        calm = Place(folder, f"sqlite:///{folder}/store.db", self.bundle)
        calm.watched = self.incoming
        assert calm.run("--once", CXRBATCH_TRUNCATED_TRIES="1", CXRBATCH_BATCH_SIZE="32") in (0, 3), calm.log[-3000:]
        return calm.rows()

    def no_orphans(self) -> None:
        """Nothing of the daemons that have ended is still running."""
        groups = {process.pid for process in self.started if process.poll() is not None}
        deadline = time.monotonic() + 20
        while left := of_groups(groups):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def clean_up(self) -> None:
        for process in self.started:
            kill_group(process)


@lru_cache(maxsize=8)
def engine_of(url: str) -> sa.Engine:
    """Made once a store: making one costs more than a question."""
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
    process.wait(PATIENCE_S)


def some_files(folder: Path, films: int = 12) -> None:
    """Films, two names for one content, junk, an empty file and a truncated one."""
    from road import film

    for seed in range(films):
        film(folder / f"{seed % 3}" / f"{seed}.png", seed)
    (folder / "same.png").write_bytes((folder / "0" / "0.png").read_bytes())
    (folder / "junk.dcm").write_text("<html>not a film</html>")
    (folder / "half.png").write_bytes((folder / "1" / "1.png").read_bytes()[:200])
    for name in ("same.png", "junk.dcm", "half.png"):
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))


def names(paths: Sequence[Path]) -> set[str]:
    return {path.name for path in paths}
