"""Stage 2, decode: a pool of killable processes, each with its own pipe.

Decoders abort, stall inside C code and exhaust memory. So they run in spawned processes under an address-space limit,
and the parent measures the time: a worker that dies or stalls costs only its own file. There is one pipe per worker
and no lock between workers, so killing one at any instant cannot harm another (docs/adr/0002).
"""

from __future__ import annotations

import random
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from cxrbatch import unexpected
from cxrbatch.decoding.decode_worker import Answer, DecodeTask, Job, Ready, Worker
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import Fatal, ReasonCode, Rejected, Retry
from cxrbatch.failpoints import failpoint
from cxrbatch.imaging.limits import Limits
from cxrbatch.intake.remote import is_remote, read_object
from cxrbatch.types import DecodedImage, FoundFile, ModelInputSpec, Outcome

__all__ = ["DecodeFile", "DecodeTask", "decode_all"]


@dataclass(frozen=True, slots=True)
class DecodeFile:
    """The decode task. It is a class, and not decode_file itself, so that the parent need not load the codecs."""

    specs: tuple[ModelInputSpec, ...]
    limits: Limits
    identifiers: Identifiers
    exact: bool = False
    roots: tuple[str, ...] = ()  # only files inside these folders are opened; empty: no restriction

    def __call__(self, file: FoundFile) -> DecodedImage:
        from cxrbatch.imaging.decode import decode_bytes, decode_file

        failpoint("worker.given")
        started = time.monotonic()
        how = (self.specs, self.limits, self.identifiers, self.exact)
        if is_remote(file.path):
            image = decode_bytes(read_object(file, self.limits), *how)
        else:
            image = decode_file(file.path, file.size, file.mtime_ns, *how, self.roots)
        failpoint("worker.decoded")
        return replace(image, decode_s=time.monotonic() - started)


_STARTING_S = 120.0  # a cold disk may take long to load the codecs
_IDLE_S = 0.02  # between two polls for work
_LARGEST_STEP_S = 1.0  # largest advance of the pool's clock between two polls; at most half of timeout_s
_STRETCH = 4.0  # times timeout_s: how long a worker may be stopped, or wait for a CPU
_BUSY_MACHINE_S = 10.0  # added when it waits for a CPU: on a busy machine a short timeout_s is soon over
_KILLED_WAITS_S = (0.0, 1.0)  # delays before the retries of a file whose worker was killed from outside
_CRASHES = 2  # decoder crashes on one file before the file is rejected
_FAILED_STARTS = 3
_KILLED_STARTS = 8
#: Process states, see proc(5).
_CANNOT_RUN = ("R", "T", "t")  # runnable on a busy machine, stopped, traced
_GONE = ("", "Z", "X")
#: Signals that a process causes itself. Any other comes from outside: the kernel's OOM killer, an operator.
_OWN_SIGNALS = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
        *(signal.SIGTRAP, signal.SIGSYS, signal.SIGXCPU, signal.SIGXFSZ),
    }
)


def decode_all(
    files: Iterator[FoundFile | None],
    task: DecodeTask,
    *,
    workers: int,
    timeout_s: float,
    memory_mib: int,
    tick_s: float = 0.1,
) -> Iterator[Outcome | None]:
    """Decode `files` in up to `workers` processes; yields outcomes as they finish, in no particular order.

    Yields None as soon as no file is in progress, and whenever nothing finished for `tick_s` seconds, so that later
    stages need not wait for more. A None in `files` means that nothing is ready right now.
    A file gets `timeout_s` seconds from the moment when a ready worker receives it. Time in which this process or the
    whole machine was suspended does not count. A file whose decoder crashes is tried once more. A file whose worker is
    killed from outside is retried after a delay, and in the end gets the reason DECODE_INTERRUPTED (a Retry).
    Raises Fatal when workers cannot start. All workers have ended once the iterator is closed.
    """
    pool = _Pool(task, workers, timeout_s, memory_mib)
    exhausted = False
    tick_at = 0.0  # when idle
    try:
        while True:
            waiting_for_files = False
            while not exhausted and not waiting_for_files and pool.has_room():
                file = next(files, _END)
                if file is _END:
                    exhausted = True
                elif file is None:
                    waiting_for_files = True
                elif file.problem is not None:
                    yield Outcome(file, rejected=file.problem)
                else:
                    pool.add(file)
            if pool.jobs_in_hand:
                tick_at = 0.0
                outcomes = pool.look(tick_s)
                yield from outcomes
                if not outcomes:
                    yield None
                continue
            if exhausted:
                return
            pool.look(0)  # a worker may have become ready
            if time.monotonic() >= tick_at:
                tick_at = time.monotonic() + tick_s
                yield None
            time.sleep(_IDLE_S)
    finally:
        pool.close()


_END = FoundFile("", 0, 0, 0)  # compared by identity


class _Pool:
    """The workers, started on demand, and the jobs that wait for one."""

    def __init__(self, task: DecodeTask, workers: int, timeout_s: float, memory_mib: int) -> None:
        self._task, self._most, self._timeout_s, self._memory_mib = task, workers, timeout_s, memory_mib
        self._workers: list[Worker] = []
        self._waiting: deque[Job] = deque()
        self._delayed: list[Job] = []  # until Job.due
        self._failed_starts = self._killed_starts = 0
        self._no_start_before = 0.0  # monotonic seconds
        # The pool's own clock, in seconds. While this process is stopped, suspended or blocked, it cannot take an
        # answer, and the workers were perhaps stopped too: such a gap counts as one second at most.
        self._now = 0.0
        self._looked_at = time.monotonic()
        self._start()  # loads the codecs while the first file is looked for

    @property
    def jobs_in_hand(self) -> int:
        return len(self._waiting) + len(self._delayed) + sum(worker.job is not None for worker in self._workers)

    def has_room(self) -> bool:
        """Whether another file can be taken: each needs a worker or a starting one. Delayed jobs count too."""
        return self.jobs_in_hand < self._most

    def add(self, file: FoundFile) -> None:
        self._waiting.append(Job(file))
        self._assign()

    def look(self, at_most_s: float) -> list[Outcome]:
        """Assign jobs, wait up to `at_most_s` seconds for answers, and stop workers that exceed their time limit."""
        self._assign()
        answered = set(wait([worker.pipe for worker in self._workers], at_most_s)) if self._workers else set()
        if not self._workers:
            time.sleep(at_most_s)
        monotonic = time.monotonic()
        self._now += min(monotonic - self._looked_at, _LARGEST_STEP_S, self._timeout_s / 2)
        self._looked_at = monotonic
        outcomes: list[Outcome | None] = []
        for worker in list(self._workers):
            # An answer that is ready counts even after the deadline: this process may be the late one.
            outcomes.append(self._take(worker) if worker.pipe in answered else self._check_time(worker))
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _start(self) -> None:
        try:
            self._workers.append(Worker(self._task, self._memory_mib, self._now))
        except OSError:  # out of memory, descriptors or processes: this may pass
            self._start_failed(None)

    def _assign(self) -> None:
        monotonic = time.monotonic()
        for job in [job for job in self._delayed if job.due <= monotonic]:
            self._delayed.remove(job)
            self._waiting.append(job)
        for worker in self._workers:
            if worker.idle and self._waiting:
                worker.give(self._waiting.popleft(), self._now, monotonic)
        starting = sum(not worker.ready for worker in self._workers)
        while starting < len(self._waiting) and len(self._workers) < self._most and monotonic >= self._no_start_before:
            self._start()
            starting += 1

    def _take(self, worker: Worker) -> Outcome | None:
        """Read the worker's message. None when its job continues or is retried."""
        try:
            message: object = worker.pipe.recv()
        except (EOFError, OSError):
            return self._died(worker)
        if isinstance(message, Fatal):
            raise message
        assert isinstance(message, Ready | Answer)
        worker.cpu_before_s = message.cpu_s
        if isinstance(message, Ready):
            worker.ready = True
            self._failed_starts = self._killed_starts = 0
            return None
        assert worker.job is not None
        for error in message.unexpected:
            unexpected.record(error)
        job, worker.job = worker.job, None
        first_of_worker = worker.jobs == 1
        if worker.worn_out:
            self._remove(worker)
        if isinstance(message.result, DecodedImage):
            return Outcome(job.file, image=message.result)
        out_of_memory = message.result.reason_code == ReasonCode.DECODER_OUT_OF_MEMORY
        if out_of_memory and not first_of_worker and not job.had_fresh_worker:
            # Earlier files may have left the worker's memory full: a fresh worker decides.
            if not worker.worn_out:
                self._remove(worker)
            job.had_fresh_worker = True
            self._waiting.append(job)
            return None
        return Outcome(job.file, rejected=message.result)

    def _check_time(self, worker: Worker) -> Outcome | None:
        """Stop a worker that exceeds its time limit: in CPU time, or in wall time unless it waits for a CPU."""
        if not worker.ready:
            if self._now - worker.started_at > _STARTING_S:
                self._start_failed(self._remove(worker))
            return None
        if worker.job is None or time.monotonic() - worker.given_at_monotonic < self._timeout_s:
            return None
        state, cpu_s = worker.cpu_s()
        if state in _GONE:
            return None  # its pipe reports this at the next poll
        waited_s = self._now - worker.given_at
        if cpu_s < self._timeout_s:
            if waited_s < self._timeout_s:
                return None
            most_s = _STRETCH * self._timeout_s + (_BUSY_MACHINE_S if state == "R" else 0)
            if state in _CANNOT_RUN and waited_s < most_s:
                return None
        file = worker.job.file
        self._remove(worker)
        if cpu_s < self._timeout_s and (state == "D" or is_remote(file.path)):
            reason = "Reading the file took longer than decode_timeout_s: the disk, share or bucket does not answer."
            return Outcome(file, rejected=Retry(ReasonCode.UNREADABLE, reason))
        if cpu_s < self._timeout_s and state in _CANNOT_RUN:
            reason = "The decoder was stopped, or got no processor for long; the file is tried again."
            return Outcome(file, rejected=Retry(ReasonCode.DECODE_INTERRUPTED, reason))
        reason = "Decoding took longer than decode_timeout_s and was stopped; the file is damaged or very large."
        return Outcome(file, rejected=Rejected(ReasonCode.DECODE_TIMEOUT, reason))

    def _died(self, worker: Worker) -> Outcome | None:
        job, was_ready, code = worker.job, worker.ready, self._remove(worker, is_dead=True)
        if not was_ready:
            self._start_failed(code)
            return None
        if job is None:
            return None  # it died idle
        if _killed_from_outside(code):
            job.kills += 1
            if job.kills > len(_KILLED_WAITS_S):
                reason = "The decode worker was killed again and again, perhaps for want of memory; it is tried again."
                return Outcome(job.file, rejected=Retry(ReasonCode.DECODE_INTERRUPTED, reason))
            job.due = time.monotonic() + _KILLED_WAITS_S[job.kills - 1] * random.uniform(0.75, 1.25)
            self._delayed.append(job)
            return None
        job.crashes += 1
        if job.crashes < _CRASHES:
            self._waiting.append(job)
            return None
        reason = f"The decoder died on this file twice (exit code {code}); it is damaged."
        return Outcome(job.file, rejected=Rejected(ReasonCode.DECODER_CRASHED, reason))

    def _start_failed(self, code: int | None) -> None:
        if _killed_from_outside(code):
            self._killed_starts += 1
            self._no_start_before = time.monotonic() + 0.25 * 2.0**self._killed_starts
        else:
            self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS or self._killed_starts >= _KILLED_STARTS:
            raise Fatal(
                f"Decode workers die while they start (exit code {code}); raise worker_memory_mib, or see "
                "`cxrbatch doctor`."
            )

    def _remove(self, worker: Worker, *, is_dead: bool = False) -> int | None:
        self._workers.remove(worker)
        return worker.kill(is_dead=is_dead)


def _killed_from_outside(code: int | None) -> bool:
    """Whether an exit code (None: the process does not end) was not caused by the file that was being read."""
    return code is None or (code < 0 and -code not in _OWN_SIGNALS)
