"""Stage 2, decode: a handful of killable processes, each with a pipe of its own.

Decoders abort, stall inside C and eat memory. So they run in spawned processes under an address-space limit,
and the parent holds the clock: a worker that dies or stalls costs its own file and nobody else's. One pipe
a worker, and no lock between them, means that killing one at any instant cannot harm another (docs/adr/0002).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from cxrbatch.allocator import keep_freed_memory
from cxrbatch.crash import crash_point
from cxrbatch.dicom.identifiers import Identifiers
from cxrbatch.errors import Fatal, ReasonCode, Rejected
from cxrbatch.formats.limits import Limits
from cxrbatch.nouns import DecodedImage, FoundFile, Outcome, PlaneSpec

__all__ = ["DecodeFile", "DecodeTask", "decode_all"]

#: What a worker runs: picklable; a FoundFile in, a DecodedImage out, Rejected raised.
DecodeTask = Callable[[FoundFile], DecodedImage]


@dataclass(frozen=True, slots=True)
class DecodeFile:
    """The task of the road. A class, and not decode_file itself, so that the parent need not load the codecs."""

    specs: tuple[PlaneSpec, ...]
    limits: Limits
    identifiers: Identifiers
    exact: bool = False

    def __call__(self, file: FoundFile) -> DecodedImage:
        from cxrbatch.decode import decode_file

        crash_point("worker.given")
        image = decode_file(file.path, file.size, file.mtime_ns, self.specs, self.limits, self.identifiers, self.exact)
        crash_point("worker.decoded")
        return image


_SPAWN = multiprocessing.get_context("spawn")
_JOBS_A_WORKER = 5_000  # then it is replaced, and what a codec leaks goes with it
_STARTING_S = 120.0  # a cold disk may take long to load the codecs
_IDLE_S = 0.02  # between two looks for something to do
_READY = "ready"
_PR_SET_PDEATHSIG = 1
_LARGEST_BLOCK, _KEPT = 32 * 2**20, 64 * 2**20  # bytes that a film leaves for the next one


@dataclass(slots=True)
class _Job:
    file: FoundFile
    attempt: int = 1
    deadline: float = 0.0  # monotonic seconds


def decode_all(
    files: Iterator[FoundFile | None],
    task: DecodeTask,
    *,
    workers: int,
    timeout_s: float,
    memory_mib: int,
    tick_s: float = 0.1,
) -> Iterator[Outcome | None]:
    """Decode `files` in `workers` processes; outcomes come as they finish, in no order.

    Yields None at once when nothing is left in hand, and whenever nothing finished for `tick_s`: stages behind need
    not wait for more. A None among `files` means that there is nothing to do right now. A file whose worker dies is
    tried once more in a fresh one, for the killer may have been somebody else (a kernel short of memory, an
    operator): twice is its own fault.
    Raises Fatal when workers cannot even start. All workers are gone once the iterator is closed.
    """
    pool = [_Worker(task, memory_mib) for _ in range(workers)]
    again: deque[_Job] = deque()
    exhausted = False
    tick_at = 0.0  # when idle
    try:
        while True:
            waiting_for_files = False
            for worker in pool:
                while worker.job is None and not waiting_for_files and (again or not exhausted):
                    if again:
                        worker.give(again.popleft(), timeout_s)
                        continue
                    file = next(files, _END)
                    if file is _END:
                        exhausted = True
                    elif file is None:
                        waiting_for_files = True
                    elif file.problem is not None:
                        yield Outcome(file, rejected=file.problem)
                    else:
                        worker.give(_Job(file), timeout_s)
            busy = [worker for worker in pool if worker.job is not None]
            if not busy:
                if exhausted:
                    return
                if time.monotonic() >= tick_at:
                    tick_at = time.monotonic() + tick_s
                    yield None
                time.sleep(_IDLE_S)
                continue
            tick_at = 0.0
            finished = _wait(busy, tick_s)
            if not finished:
                yield None
            for worker in finished:
                outcome = worker.take(again)
                if outcome is not None:
                    yield outcome
    finally:
        for worker in pool:
            worker.kill()


_END = FoundFile("", 0, 0, 0)  # compared by identity


def _wait(busy: list[_Worker], tick_s: float) -> list[_Worker]:
    """The workers that have an answer, are dead, or are over their time; at most `tick_s` of waiting."""
    next_deadline = min(worker.job.deadline for worker in busy if worker.job)
    patience = max(0.0, min(tick_s, next_deadline - time.monotonic()))
    answered = set(wait([worker.pipe for worker in busy], patience))
    now = time.monotonic()
    # An answer that lies ready counts even past the deadline: it may be us who came back late.
    return [w for w in busy if w.pipe in answered or (w.job and now > w.job.deadline)]


class _Worker:
    """One process, its pipe, and the job that it has in hand."""

    def __init__(self, task: DecodeTask, memory_mib: int) -> None:
        self._task, self._memory_mib = task, memory_mib
        self.job: _Job | None = None
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=_serve, args=(theirs, self._task, self._memory_mib, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False
        self._jobs_left = _JOBS_A_WORKER

    def give(self, job: _Job, timeout_s: float) -> None:
        if self._jobs_left == 0 or (self._ready and not self._process.is_alive()):
            self._replace()
        job.deadline = time.monotonic() + timeout_s + (0.0 if self._ready else _STARTING_S)
        self.job = job
        self._jobs_left -= 1
        with contextlib.suppress(OSError):  # it is dead; take() finds out
            self.pipe.send(job.file)

    def take(self, again: deque[_Job]) -> Outcome | None:
        """The outcome of the job in hand; None where there is none yet (or the job went to `again`)."""
        job = self.job
        assert job is not None
        answer: object = None
        try:
            if self.pipe.poll():
                answer = self.pipe.recv()
            else:
                return self._out_of_time(job)
        except (EOFError, OSError):
            return self._died(job, again)
        if isinstance(answer, Fatal):
            raise answer
        if answer == _READY:
            self._ready, self._failed_starts = True, 0
            return None
        if isinstance(answer, Rejected):
            first_of_worker = self._jobs_left == _JOBS_A_WORKER - 1
            if answer.reason_code == ReasonCode.DECODER_OUT_OF_MEMORY and job.attempt == 1 and not first_of_worker:
                # What earlier files left behind may have filled it: a fresh one judges.
                self._replace()
                job.attempt = 2
                again.append(job)
                return None
            self.job = None
            return Outcome(job.file, rejected=answer)
        self.job = None
        assert isinstance(answer, DecodedImage)
        return Outcome(job.file, image=answer)

    def _out_of_time(self, job: _Job) -> Outcome:
        self._replace()
        return Outcome(
            job.file,
            rejected=Rejected(
                ReasonCode.DECODE_TIMEOUT,
                "Decoding took longer than decode_timeout_s and was stopped; the file is damaged or very large.",
            ),
        )

    def _died(self, job: _Job, again: deque[_Job]) -> Outcome | None:
        was_ready = self._ready
        code = self._replace()
        if not was_ready:
            self._failed_starts += 1
            if self._failed_starts > 2:
                raise Fatal(
                    f"Decode workers die while they start (exit code {code}); raise worker_memory_mib, or see "
                    "`cxrbatch doctor`."
                )
            again.append(job)
            return None
        if job.attempt == 1:
            job.attempt = 2
            again.append(job)
            return None
        return Outcome(
            job.file,
            rejected=Rejected(
                ReasonCode.DECODER_CRASHED, f"The decoder died on this file twice (exit code {code}); it is damaged."
            ),
        )

    def _replace(self) -> int | None:
        code = self.kill()
        self._start()
        return code

    def kill(self) -> int | None:
        """End the process at once. Returns its exit code (negative: the signal)."""
        self.job = None
        self._process.kill()
        self.pipe.close()
        self._process.join()
        return self._process.exitcode


def _serve(pipe: Connection, task: DecodeTask, memory_mib: int, parent: int) -> None:
    """The worker process: FoundFile in, DecodedImage or Rejected out, until the pipe closes."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # a Ctrl-C reaches the whole group; the parent decides
        signal.signal(signum, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphan, even when the parent is killed
    if os.getppid() != parent:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C codecs chatter on stderr
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_freed_memory(_LARGEST_BLOCK, _KEPT)
    try:
        importlib.import_module("cxrbatch.decode")  # the codecs, before the clock of the first file runs
    except Exception as error:
        pipe.send(Fatal(f"Decode workers cannot load the codecs ({error}); install cxrbatch again."))
        return
    pipe.send(_READY)
    while True:
        try:
            file: FoundFile = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: DecodedImage | Rejected = task(file)
        except Rejected as rejected:
            answer = rejected
        except MemoryError:
            answer = Rejected(ReasonCode.DECODER_OUT_OF_MEMORY, "Decoding needs more than worker_memory_mib.")
        except BaseException as error:  # some codecs raise BaseException on damage
            answer = Rejected(
                ReasonCode.DECODER_CRASHED,
                f"The decoder failed in a way it should not ({type(error).__name__}); please report this.",
            )
        try:
            pipe.send(answer)
        except OSError:
            return
