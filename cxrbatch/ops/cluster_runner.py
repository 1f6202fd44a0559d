"""One node's share of a scan with `--ray`: what a Runner is told, does, and says (ops/cluster.py places it)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from cxrbatch import __version__, pipeline
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import Fatal, StoreDown
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.intake.remote import is_remote
from cxrbatch.intake.watcher import claims
from cxrbatch.ops.setup import claimed_at_once, job_queue_of
from cxrbatch.pipeline import Context, Counts, Sink
from cxrbatch.settings import Settings, without_password
from cxrbatch.store import JobQueue, RetryPolicy, Run, Store

__all__ = ["Job", "Runner", "Status", "folders_of", "named_of"]


@dataclass(frozen=True, slots=True)
class Job:
    """What a Runner needs to know. Goes to the nodes by Ray, with the database's password and the key of hashes."""

    settings: Settings
    identifiers: Identifiers
    roots: tuple[str, ...]
    run: Run
    bundle_key: str
    folders: tuple[str, ...] = ()  # that are not empty where the scan was started, and so must not be on a node
    named: frozenset[str] = frozenset()  # roots that are files; a shell's * names any number
    version: str = __version__  # of cxrbatch; a node with another one must find it here

    def queue(self, store: Store) -> JobQueue:
        """The job queue for this process."""
        return replace(job_queue_of(store, self.run, self.settings), named=self.named)


@dataclass(frozen=True, slots=True)
class Status:
    """What a Runner says of itself."""

    counts: Counts
    finished: bool
    error: str = ""  # a sentence; the runner has ended


class Runner:
    """One node's share: claims files, decodes, scores and records them until it is told to finish. A Ray actor."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stop, self._drained = threading.Event(), threading.Event()
        self._counts, self._error = Counts(), ""
        self._thread = threading.Thread(target=self._run, name="runner")
        self._thread.start()

    def status(self) -> Status:
        return Status(self._counts, not self._thread.is_alive(), self._error)

    def finish(self, *, now: bool) -> None:
        """Nothing more will come (end when nothing is left to claim), or `now`: end with what is in hand."""
        (self._stop if now else self._drained).set()

    def _run(self) -> None:
        try:
            self._work()
        except StoreDown:
            pass  # only when stopped: what was in hand is claimed again once its lease has run out
        except Fatal as error:
            self._error = str(error)
        except BaseException as error:
            self._error = f"The runner failed ({type(error).__name__}: {without_password(str(error))[:300]})."

    def _work(self) -> None:
        job, settings = self._job, self._job.settings
        bundle = load_bundle(settings.cascade)
        if bundle.key(settings.exact) != job.bundle_key:
            raise Fatal(f"The bundle {settings.cascade} is another one here: install the same files on every node.")
        if job.version != __version__:
            raise Fatal(f"cxrbatch {__version__} is installed here, not {job.version}: install the same on every node.")
        for folder in job.folders:
            if not _holds_something(folder):
                raise Fatal(
                    f"{folder} is missing or empty on {socket.gethostname()}: mount it on every node under this path."
                )
        retry = RetryPolicy(forever=True, stop=self._stop)
        with retry(partial(Store.open, settings.db, may_create=False)) as store:
            job_queue = job.queue(store)
            ended = threading.Event()
            renewing = threading.Thread(target=_renew, args=(job_queue, ended), daemon=True)
            renewing.start()
            claimed = claims(
                job_queue,
                lambda: job.roots,
                claimed_at_once(settings),
                retry=retry,
                work_available=threading.Event(),
                enough=self._drained.is_set,
            )
            context = Context(settings, bundle, job.identifiers, job.roots, self._counts, retry=retry)
            try:
                pipeline.run(claimed, context, partial(_start, settings, bundle, job_queue))
            finally:
                ended.set()
                with suppress(StoreDown):
                    job_queue.release()


def folders_of(roots: Sequence[str]) -> tuple[str, ...]:
    """What a node must have for these roots: folders that are not empty here, and those of files that are named.

    A node without them would end all files as `vanished`, faster than any other works.
    """
    local = (root for root in roots if not is_remote(root))
    folders = {root if os.path.isdir(root) else os.path.dirname(root) for root in local}
    return tuple(folder for folder in sorted(folders) if _holds_something(folder))


def named_of(roots: Sequence[str]) -> frozenset[str]:
    """The roots that are files here. An object in a bucket may be a folder, too."""
    return frozenset(root for root in roots if not is_remote(root) and not os.path.isdir(root))


def _holds_something(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _start(settings: Settings, bundle: Bundle, job_queue: JobQueue) -> tuple[InferenceEngine, Sink]:
    engine = open_engine(settings.engine, settings.device, bundle)
    return engine, Sink(job_queue.store, job_queue.run.cascade_id, job_queue.record)


def _renew(job_queue: JobQueue, ended: threading.Event) -> None:
    while not ended.wait(job_queue.lease_s / 3):
        with suppress(StoreDown):
            job_queue.renew()
