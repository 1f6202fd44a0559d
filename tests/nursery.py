"""Processes that begin with everything imported: a fork of one that waits, instead of two CPU seconds of imports.

What is forked is the command line itself, in a session of its own, before any thread, lock or open file of it
exists; its decode processes are spawned as ever. It dies of kill -9 like any other.

Nursery.start returns what subprocess.Popen would. The waiting process is daemon.py with the argument --nursery:
requests come as lines of JSON, pids and exit codes go back. It ends with the tests.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Life", "Nursery", "serve"]


class Life:
    """One process of the nursery, as subprocess.Popen shows it."""

    def __init__(self, nursery: Nursery, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args, self.returncode = pid, args, None
        self._nursery = nursery

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code (negative: the signal) once it has ended."""
        if self.returncode is None:
            self.returncode = self._nursery.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


class Nursery:
    """The tests' end."""

    def __init__(self, program: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, program, "--nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        atexit.register(self._end)
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def start(self, args: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> Life:
        assert self._process.stdin and self._process.stdout
        wanted = {"args": list(args), "cwd": str(cwd), "env": dict(env), "log": str(log)}
        with self._lock:
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            while "started" not in (said := self._hear()):
                pass
        return Life(self, said["started"], args)

    def code_of(self, pid: int) -> int | None:
        assert self._process.stdout
        with self._lock:
            while pid not in self._codes and select.select([self._process.stdout], [], [], 0)[0]:
                self._hear()
            return self._codes.get(pid)

    def _end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)

    def _hear(self) -> dict[str, int]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the nursery has ended"
        said: dict[str, int] = json.loads(line)
        if "ended" in said:
            self._codes[said["ended"]] = said["code"]
        return said


def serve(main: Callable[[], None]) -> None:
    """The waiting process: fork for each request, tell of each end; until the tests are gone."""
    poll, children = select.poll(), dict[int, int]()  # pid by its pidfd
    poll.register(0, select.POLLIN)
    requests = b""
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                some = os.read(0, 1 << 16)
                if not some:
                    return
                requests += some
                while b"\n" in requests:
                    line, requests = requests.split(b"\n", 1)
                    pid = os.fork()
                    if pid == 0:
                        _begin(json.loads(line), main)
                    children[pidfd := os.pidfd_open(pid)] = pid
                    poll.register(pidfd, select.POLLIN)
                    _say(started=pid)
            else:
                pid = children.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                _say(ended=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _say(**values: int) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


def _begin(wanted: dict[str, object], main: Callable[[], None]) -> None:
    """In the new process: become what was asked for."""
    os.setsid()
    os.chdir(str(wanted["cwd"]))
    os.environ.clear()
    os.environ.update(wanted["env"])  # type: ignore[call-overload]
    log = os.open(str(wanted["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((0, nothing), (1, log), (2, log)):
        os.dup2(theirs, ours)
    os.closerange(3, 1024)  # nothing of the nursery's or of our sisters'
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cxrbatch", *wanted["args"]]  # type: ignore[misc]
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
