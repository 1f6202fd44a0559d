"""What runs beside the pipeline of `cxrbatch watch`: its shared state, and the threads that watch, report, receive and
send."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cxrbatch import unexpected
from cxrbatch.decoding.decode_worker import kill_workers
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.intake.folder_state import FolderState, Schedule
from cxrbatch.intake.inotify import InotifyTrigger
from cxrbatch.intake.remote import is_remote
from cxrbatch.intake.watcher import FolderWatcher
from cxrbatch.mounts import mount_points_below
from cxrbatch.ops.health import BEAT_LIMIT_S, Health
from cxrbatch.ops.logs import log, where
from cxrbatch.ops.metrics import Metrics
from cxrbatch.ops.reporter import Reporter, show_root
from cxrbatch.ops.setup import wanted_of
from cxrbatch.pipeline.counts import Counts
from cxrbatch.settings import Settings
from cxrbatch.store import JobQueue, RetryPolicy, Store, StoreDown

if TYPE_CHECKING:
    from cxrbatch.ops.dispatch import Dispatch

__all__ = [
    "Daemon",
    "end_run",
    "long_paths_of",
    "show_figures",
    "start_dispatch",
    "start_lease_threads",
    "start_receiver",
    "start_watchers",
]


@dataclass(slots=True)
class Daemon:
    """The state of the daemon between two loads of the settings."""

    settings: Settings
    bundle: Bundle
    roots: list[str]
    once: bool
    metrics: Metrics = field(default_factory=Metrics)
    health: Health = field(default_factory=Health)
    stop: threading.Event = field(default_factory=threading.Event)
    work_available: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    counts: Counts = field(default_factory=Counts)
    watchers: list[FolderWatcher] = field(default_factory=list)
    some_rejected: bool = False  # with `once`, at its end: a file has a reason code, or a folder cannot be listed
    failure: BaseException | None = None
    caught: list[int] = field(default_factory=list)  # the signals that ask for the end of the process
    reloading: bool = False  # it stops because of a SIGHUP

    @property
    def exit_code(self) -> ExitCode:
        """That of a stop. Only a daemon without end has done its work when SIGTERM ends it."""
        unfinished = self.once or self.caught[:1] == [signal.SIGINT]
        return ExitCode.INTERRUPTED if self.caught and unfinished else ExitCode.OK

    def reload(self) -> None:
        """Stop, to begin again with other settings."""
        self.reloading = True
        self.stop.set()

    def fail(self, error: BaseException) -> None:
        """A dead thread stops the process: a partial daemon would look healthy."""
        log.critical("thread_failed", error=type(error).__name__, where=where(error.__traceback__))
        self.failure = error
        self.stop.set()


def end_run(daemon: Daemon, job_queue: JobQueue) -> None:
    with suppress(StoreDown):
        released = job_queue.release()
        counts = {"processed": daemon.counts.processed, "unexpected_errors": unexpected.total()}
        job_queue.store.end_run(job_queue.run.run_id, counts)
        log.info("stopped", done=daemon.counts.scored, rejected=daemon.counts.rejected.total(), held=released)


def start_watchers(daemon: Daemon, job_queue: JobQueue, stack: ExitStack, retry: RetryPolicy) -> None:
    settings = daemon.settings
    wanted = wanted_of(settings)
    for root in daemon.roots:
        trigger = InotifyTrigger(root, settings.poll)
        armed = trigger.arm()
        stack.callback(trigger.disarm)
        log.info(
            "watching", folder=root, poll="never" if armed else f"{settings.poll_s:g} s", why=trigger.why_not or ""
        )
        watcher = FolderWatcher(
            FolderState(root, wanted, settings.quiet_s, inodes_tell=not trigger.silent, mount_points=_mount_points),
            Schedule(settings.rescan_s, poll_s=settings.poll_s, events=armed),
            job_queue,
            retry=retry,
            work_available=daemon.work_available,
            log_event=log.warning,
            fail=daemon.fail,
            trigger=trigger,
        )
        daemon.watchers.append(watcher)
        show_root(len(daemon.watchers) - 1, watcher, daemon.metrics, daemon.health)
        watcher.start()


def _mount_points(root: str) -> frozenset[str]:
    return frozenset() if is_remote(root) else mount_points_below(root)


def show_figures(daemon: Daemon, job_queue: JobQueue, stack: ExitStack) -> None:
    reporter = Reporter(
        daemon.settings,
        daemon.bundle,
        daemon.watchers,
        lambda: daemon.counts.processed,
        job_queue,
        daemon.metrics,
        daemon.health,
    )
    run = partial(_or_fail, lambda *_: reporter.run(daemon.stop), daemon, job_queue)
    thread = threading.Thread(target=run, name="reporter", daemon=True)
    thread.start()
    stack.callback(thread.join, 2)
    stack.callback(daemon.stop.set)


def start_receiver(daemon: Daemon, stack: ExitStack) -> None:
    from cxrbatch.ops.receive import receiving

    clock, last_beat = daemon.health.clock, [daemon.health.clock()]

    def heartbeat() -> None:
        last_beat[0] = clock()

    receiver = stack.enter_context(receiving(daemon.settings, Path(daemon.roots[0]), daemon.metrics, heartbeat))
    daemon.health.add("receiver", lambda: last_beat[0], BEAT_LIMIT_S)
    log.info("receiving", host=receiver.host, port=receiver.port)


def start_dispatch(daemon: Daemon, store: Store) -> Dispatch | None:
    """The threads that send results, where the settings name a destination. Raises Fatal if these cannot be used."""
    if not daemon.settings.send_to:
        return None
    try:
        from cxrbatch.ops.dispatch import Dispatch
    except ModuleNotFoundError:
        raise Fatal("The setting send_to needs an extra: pip install 'cxrbatch[dicom]'.") from None

    dispatch = Dispatch(daemon.settings, store, daemon.stop, daemon.fail)
    dispatch.start()
    return dispatch


def long_paths_of(daemon: Daemon) -> Mapping[str, str]:
    return ChainMap(*(watcher.folder.long_paths for watcher in daemon.watchers))


def start_lease_threads(daemon: Daemon, job_queue: JobQueue) -> None:
    """Renew what is in progress; after a stop, give it drain_s seconds and then end the process."""
    for task in (_renew_leases, _enforce_drain):
        threading.Thread(target=_or_fail, args=(task, daemon, job_queue), name=task.__name__, daemon=True).start()


def _or_fail(task: Callable[[Daemon, JobQueue], None], daemon: Daemon, job_queue: JobQueue) -> None:
    try:
        task(daemon, job_queue)
    except BaseException as error:
        daemon.fail(error)


def _renew_leases(daemon: Daemon, job_queue: JobQueue) -> None:
    while not daemon.finished.wait(job_queue.lease_s / 3):
        with suppress(StoreDown):
            job_queue.renew()


def _enforce_drain(daemon: Daemon, job_queue: JobQueue) -> None:
    """After a stop, work in progress has drain_s seconds; then its leases are released and the process ends.

    A reload must not end it: the same command starts in its place, and reads the new settings.
    """
    daemon.stop.wait()
    if daemon.finished.wait(daemon.settings.drain_s):
        return
    giver = threading.Thread(target=end_run, args=(daemon, job_queue), daemon=True)
    giver.start()
    giver.join(1.5)  # a store that is away gets its leases back by their expiry
    log.warning("drain_cut_short", seconds=daemon.settings.drain_s)
    if daemon.reloading and not daemon.caught and daemon.failure is None:
        if daemon.finished.is_set():
            return  # meanwhile it came to its end after all
        _start_again(daemon)
    os._exit(daemon.exit_code if daemon.failure is None else ExitCode.FATAL)


def _start_again(daemon: Daemon) -> None:
    """Replace this process, whatever its threads are doing, by a new one of the same command and process ID.

    The exec closes all sockets and files, and with them the locks of a SQLite store; only those of inotify would stay.
    """
    with suppress(Exception):  # only leftovers would remain
        for watcher in daemon.watchers:
            watcher.trigger.disarm()
        kill_workers()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        log.critical("thread_failed", error=type(error).__name__, where=where(error.__traceback__))
        os._exit(ExitCode.FATAL)  # a service manager starts it again
