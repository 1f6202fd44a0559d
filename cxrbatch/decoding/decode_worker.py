"""One decode process: the handle that the parent holds, and the loop that the process runs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from cxrbatch import unexpected
from cxrbatch.allocator import keep_freed_memory
from cxrbatch.errors import Fatal, ReasonCode, Rejected
from cxrbatch.types import DecodedImage, FoundFile
from cxrbatch.unexpected import UnexpectedError

__all__ = ["Answer", "DecodeTask", "Job", "Ready", "Worker", "kill_workers"]

#: What a worker runs. Picklable; takes a FoundFile, returns a DecodedImage, raises Rejected.
DecodeTask = Callable[[FoundFile], DecodedImage]

_SPAWN = multiprocessing.get_context("spawn")
_JOBS_PER_WORKER = 5_000  # then the worker is replaced, which frees whatever a codec leaked
_JOIN_S = 2.0  # a killed process that still exists after this hangs in the kernel (a share that does not answer)
_PR_SET_PDEATHSIG = 1
_LARGEST_BLOCK, _KEPT = 32 * 2**20, 64 * 2**20  # bytes of freed memory that are kept for the next file
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Job:
    """A file that is being decoded, and its failed attempts."""

    file: FoundFile
    crashes: int = 0  # of the decoder on this file
    kills: int = 0  # of the worker from outside while it had this file
    had_fresh_worker: bool = False  # it ran out of memory once and is retried in a new worker
    due: float = 0.0  # monotonic seconds: when it is retried


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a job, the unexpected errors that occurred, and the CPU seconds of the worker until then."""

    result: DecodedImage | Rejected
    unexpected: tuple[UnexpectedError, ...]
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The first message of a worker: the codecs are loaded, which took so many CPU seconds."""

    cpu_s: float


_abandoned: list[multiprocessing.process.BaseProcess] = []
_no_more = False  # workers are to be started


def kill_workers() -> None:
    """Kill all workers and start no more: this process is about to be replaced.

    Its successor does not know them, and would keep them as zombies.
    """
    global _no_more
    _no_more = True
    processes = multiprocessing.active_children()
    for process in processes:
        process.kill()
    for process in processes:
        process.join(0.2)  # one that hangs in the kernel does not end


class Worker:
    """A process, its pipe and its current job. `started_at` and `given_at` are seconds of the pool's clock."""

    def __init__(self, task: DecodeTask, memory_mib: int, started_at: float) -> None:
        if _no_more:
            raise OSError("the workers have been killed for good")
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, task, memory_mib, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self.started_at = started_at
        self.ready = False
        self.jobs = 0
        self.job: Job | None = None
        self.given_at = self.given_at_monotonic = 0.0
        self.cpu_before_s = 0.0  # of its last message

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    @property
    def worn_out(self) -> bool:
        return self.jobs >= _JOBS_PER_WORKER

    def give(self, job: Job, now: float, monotonic: float) -> None:
        self.job = job
        self.jobs += 1
        self.given_at, self.given_at_monotonic = now, monotonic
        with contextlib.suppress(OSError):  # it is dead: its pipe reports this at the next poll
            self.pipe.send(job.file)

    def cpu_s(self) -> tuple[str, float]:
        """The state of the process (one letter, see proc(5); "" if it is gone) and its CPU seconds on this job."""
        state, cpu_s = self.state_and_cpu_s()
        return state, cpu_s - self.cpu_before_s

    def state_and_cpu_s(self) -> tuple[str, float]:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_bytes().rpartition(b")")[2].split()
            return fields[0].decode(), (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
        except (OSError, IndexError, ValueError):
            return "", 0.0

    def kill(self, *, is_dead: bool = False) -> int | None:
        """End the process at once. Returns its exit code (negative: the signal); None if it does not end.

        SIGKILL does not end a process that hangs in the kernel. Such a process is abandoned and not joined at exit.
        """
        if is_dead:
            self._process.join(_JOIN_S)  # its pipe has closed: let it end by itself, to get its own exit code
        self._process.kill()
        self.pipe.close()
        self._process.join(_JOIN_S)
        _abandoned[:] = [process for process in _abandoned if process.exitcode is None]
        if self._process.exitcode is None:
            _abandoned.append(self._process)
            # multiprocessing joins its children at exit, without a timeout.
            multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
        return self._process.exitcode


def _serve(pipe: Connection, task: DecodeTask, memory_mib: int, parent: int) -> None:
    """The loop of the worker process: receives a FoundFile, sends an Answer, until the pipe closes."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole process group; the parent decides
        signal.signal(signum, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan, even when the parent is killed
    if os.getppid() != parent:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C codecs print to stderr
    limit, allowed = memory_mib * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]
    if allowed != resource.RLIM_INFINITY:
        limit = min(limit, allowed)  # of `ulimit -v`, or of a batch system
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_freed_memory(_LARGEST_BLOCK, _KEPT)
    reports: list[UnexpectedError] = []
    unexpected.forward_to(reports.append)
    try:
        importlib.import_module("cxrbatch.imaging.decode")  # loads the codecs before the first file's time limit starts
    except Exception as error:
        pipe.send(Fatal(f"Decode workers cannot load the codecs ({error}); install cxrbatch again."))
        return
    pipe.send(Ready(time.process_time()))
    while True:
        try:
            file: FoundFile = pipe.recv()
        except (EOFError, OSError):
            return
        result = _run(task, file)
        answer = Answer(result, tuple(reports), time.process_time())
        reports.clear()
        try:
            pipe.send(answer)
        except OSError:
            return


def _run(task: DecodeTask, file: FoundFile) -> DecodedImage | Rejected:
    try:
        return task(file)
    except Rejected as rejected:
        return rejected
    except MemoryError:
        return Rejected(
            ReasonCode.DECODER_OUT_OF_MEMORY, "Decoding needs more than worker_memory_mib (or `ulimit -v`) allows."
        )
    except BaseException as error:  # some codecs raise BaseException on damage
        unexpected.report(error)
        return Rejected(
            ReasonCode.DECODER_CRASHED,
            f"The decoder failed in a way it should not ({type(error).__name__}); please report this.",
        )
