"""Start processes with everything imported, by forking a waiting process: this saves two CPU seconds of imports.

The waiting process forks the command line itself, in a new session, before any thread, lock or open file exists. Decode
processes are spawned as usual, and kill -9 works as for any other process.

ForkServer.start returns the same interface as subprocess.Popen; `cxrbatch` runs a command to its end. The waiting
process is daemon.py with the argument --fork-server: it reads requests as lines of JSON and writes pids and exit codes.
It ends with the tests.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

__all__ = ["Daemon", "ForkServer", "cxrbatch", "fork_server", "serve"]

HERE = Path(__file__).parent
#: Longer than any wait on a busy machine, unless something is wrong.
LIMIT_S = 400.0


class Daemon:
    """One process of the fork server, with the interface of subprocess.Popen."""

    returncode: int | None

    def __init__(self, fork_server: ForkServer, pid: int, args: Sequence[str], out: Path, err: Path) -> None:
        self.pid, self.args, self.returncode, self.out, self.err = pid, args, None, out, err
        self._fork_server = fork_server

    def poll(self) -> int | None:
        """The exit code (negative: the signal) once it has ended."""
        if self.returncode is None:
            self.returncode = self._fork_server.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = (path.read_text() if path.is_file() else "" for path in (self.out, self.err))
        return out, err

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The tests' end."""

    def __init__(self, program: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, program, "--fork-server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._folder = tempfile.mkdtemp(prefix="cxrfork")
        atexit.register(self._end)
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def start(
        self,
        args: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        *,
        given: str = "",
        out: Path | None = None,
        err: Path | None = None,
    ) -> Daemon:
        """Start `cxrbatch` with these arguments and `given` as its stdin; what it writes is appended to the files.

        Without a file, an output is kept for `communicate`.
        """
        assert self._process.stdin and self._process.stdout
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        for name, text in (("in", given), ("out", ""), ("err", "")):
            (folder / name).write_text(text)
        out, err = out or folder / "out", err or folder / "err"
        files = {"in": str(folder / "in"), "out": str(out), "err": str(err)}
        wanted = {"args": list(args), "cwd": str(cwd), "env": dict(env), **files}
        with self._lock:
            self._process.stdin.write(json.dumps(wanted) + "\n")
            self._process.stdin.flush()
            while "started" not in (said := self._hear()):
                pass
        return Daemon(self, said["started"], args, out, err)

    def code_of(self, pid: int) -> int | None:
        assert self._process.stdout
        with self._lock:
            while pid not in self._codes and select.select([self._process.stdout], [], [], 0)[0]:
                self._hear()
            return self._codes.get(pid)

    def _end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(LIMIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self) -> dict[str, int]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        said: dict[str, int] = json.loads(line)
        if "ended" in said:
            self._codes[said["ended"]] = said["code"]
        return said


@cache
def fork_server() -> ForkServer:
    return ForkServer(HERE / "daemon.py", {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"})


def cxrbatch(
    *args: object, cwd: Path, given: str = "", out: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command with its real engine, run to its end; of the settings in the environment it sees those given here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CXRBATCH_")}
    plan = kept | {"PYTHONPATH": str(HERE.parent)} | env
    process = fork_server().start(list(map(str, args)), cwd, plan, given=given, out=out)
    printed, said = process.communicate(LIMIT_S)
    return subprocess.CompletedProcess(process.args, process.wait(), printed, said)


def serve(main: Callable[[], None]) -> None:
    """The waiting process: fork for each request and report each exit, until the tests end."""
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
                    _log_event(started=pid)
            else:
                pid = children.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                _log_event(ended=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _log_event(**values: int) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


def _begin(wanted: dict[str, object], main: Callable[[], None]) -> None:
    """In the new process: run the requested command."""
    os.setsid()
    os.chdir(str(wanted["cwd"]))
    os.environ.clear()
    os.environ.update(wanted["env"])  # type: ignore[call-overload]
    how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    out, err = (os.open(str(wanted[name]), how, 0o644) for name in ("out", "err"))
    given = os.open(str(wanted["in"]), os.O_RDONLY)
    for ours, theirs in ((0, given), (1, out), (2, err)):
        os.dup2(theirs, ours)
    os.closerange(3, 1024)  # descriptors of the fork server and of other children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cxrbatch", *wanted["args"]]  # type: ignore[misc]
    sys.orig_argv[1:] = [str(HERE / "daemon.py"), *wanted["args"]]  # type: ignore[misc]  # as without a fork server
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
