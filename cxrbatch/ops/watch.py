"""`cxrbatch watch`: folder watchers fill the job queue, the pipeline empties it, signals stop or reload the daemon."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cxrbatch import pipeline
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.failpoints import failpoint
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.intake.discover import roots_of
from cxrbatch.intake.remote import is_remote
from cxrbatch.intake.watcher import claims
from cxrbatch.ops.clocked_engine import clocked
from cxrbatch.ops.daemon import (
    Daemon,
    end_run,
    long_paths_of,
    show_figures,
    start_dispatch,
    start_lease_threads,
    start_receiver,
    start_watchers,
)
from cxrbatch.ops.health import Health
from cxrbatch.ops.heartbeat import Heartbeat
from cxrbatch.ops.key_file import identifiers_of
from cxrbatch.ops.logs import listen_to_everything, log
from cxrbatch.ops.metrics import Metrics
from cxrbatch.ops.monitor import serve_monitor
from cxrbatch.ops.reporter import ProgressLog, store_outage
from cxrbatch.ops.sd_notify import sd_notify
from cxrbatch.ops.setup import begin_run, claimed_at_once, engine_description, job_queue_of
from cxrbatch.pipeline import Context, Sink
from cxrbatch.settings import Settings
from cxrbatch.store import JobQueue, RetryPolicy, Store, StoreDown, only_writer

__all__ = ["run_watch"]


def run_watch(
    load: Callable[[], Settings], folders: Sequence[str | Path], *, once: bool, verbose: bool = False
) -> ExitCode:
    """Watch until SIGTERM or SIGINT; with `once`, until everything that is there has its outcome.

    `load` reads the settings, at the start and on SIGHUP. Raises Fatal before any work when something is amiss.
    """
    settings = load()
    roots = roots_of(folders)
    for root in roots:
        if not (is_remote(root) or os.path.isdir(root)):
            raise Fatal(f"{root} is not a folder: `cxrbatch watch` wants folders, `cxrbatch scan` reads single files.")
    bundle = load_bundle(settings.cascade)
    metrics, health = Metrics([*bundle.disease.classes, NOT_CHEST, NOT_FRONTAL], len(roots)), Health()
    with ExitStack() as stack:
        stack.enter_context(only_writer(settings.db))
        if settings.metrics:
            stack.enter_context(serve_monitor(settings.metrics, metrics, health))
        failpoint("start.locked")
        heartbeat = Heartbeat(health)
        signals = stack.enter_context(_signals(heartbeat))
        before: tuple[Settings, Bundle] | None = None  # what worked until a SIGHUP
        while True:
            listen_to_everything(settings.log_format, logging.DEBUG if verbose else logging.INFO)
            daemon = Daemon(settings, bundle, roots, once, metrics, health, caught=signals.caught)
            signals.stop = daemon.stop
            if signals.caught:  # between two daemons
                daemon.stop.set()
            heartbeat.begin(daemon.reload, partial(_renewed, load, settings))
            try:
                _run_daemon(daemon, heartbeat)
            except Fatal as fatal:
                if before is None or health.ready["models"]:
                    raise
                # The settings are valid, and cannot be worked with: no such device, an address that is taken, ...
                log.error("settings_refused", why=str(fatal))
                (settings, bundle), before = before, None
                continue
            if daemon.failure is not None:
                raise daemon.failure
            if daemon.caught:
                sd_notify("STOPPING=1")
                return daemon.exit_code
            if heartbeat.renewed is None:
                return ExitCode.SOME_REJECTED if daemon.some_rejected else ExitCode.OK
            before, (settings, bundle) = (settings, bundle), heartbeat.renewed
            log.info("settings_renewed")


def _renewed(load: Callable[[], Settings], now: Settings) -> tuple[Settings, Bundle]:
    """What SIGHUP asks for. Raises Fatal when the new settings cannot be worked with: the old ones stay."""
    settings = load()
    if settings.db != now.db:
        raise Fatal("The setting db has changed, and another store needs a restart: the old settings stay.")
    if settings.metrics != now.metrics:
        raise Fatal("The setting metrics has changed, and another address needs a restart: the old settings stay.")
    return settings, load_bundle(settings.cascade)


def _run_daemon(daemon: Daemon, heartbeat: Heartbeat) -> None:
    settings = daemon.settings
    daemon.health.begin("models", "store", "disk")
    daemon.metrics.use_labels([*daemon.bundle.disease.classes, NOT_CHEST, NOT_FRONTAL])
    retry = RetryPolicy(forever=True, stop=daemon.stop, tell=store_outage(), heartbeat=heartbeat.heartbeat)
    with ExitStack() as stack:
        try:
            store = stack.enter_context(retry(partial(Store.open, settings.db)))
            job_queue = retry(partial(_begin, daemon, store))
            stack.callback(end_run, daemon, job_queue)
            retry(job_queue.release_everybodys if store.engine.dialect.name == "sqlite" else job_queue.renew)
        except StoreDown:
            return  # stopped while the store was down
        stack.callback(daemon.finished.set)
        stack.callback(daemon.stop.set)
        start_lease_threads(daemon, job_queue)
        start_watchers(daemon, job_queue, stack, retry)
        show_figures(daemon, job_queue, stack)
        if settings.listen:
            start_receiver(daemon, stack)
        dispatch = start_dispatch(daemon, job_queue.store)
        claimed = claims(
            job_queue,
            lambda: [watcher.folder.root for watcher in daemon.watchers if not watcher.paused],
            claimed_at_once(settings),
            retry=retry,
            work_available=daemon.work_available,
            long_paths=partial(long_paths_of, daemon),
            enough=lambda: daemon.once and all(watcher.idle for watcher in daemon.watchers),
        )
        with suppress(StoreDown):  # only when stopped meanwhile; what is in hand is claimed again
            identifiers = retry(partial(identifiers_of, settings, store))
            roots = tuple(daemon.roots)
            context = Context(settings, daemon.bundle, identifiers, roots, daemon.counts, ProgressLog(), retry)
            pipeline.run(claimed, context, partial(_start_engine, daemon, job_queue, retry))
            if daemon.once:
                reasons = retry(partial(store.counts, roots)).by_reason
                daemon.some_rejected = bool(reasons) or any(watcher.paused for watcher in daemon.watchers)
            if dispatch is not None and daemon.once:
                dispatch.drain()
        daemon.stop.set()
        if dispatch is not None:
            dispatch.join(2)
        for watcher in daemon.watchers:
            watcher.trigger.fired.set()  # wakes it
        for watcher in daemon.watchers:
            watcher.join(2)


def _begin(daemon: Daemon, store: Store) -> JobQueue:
    settings = daemon.settings
    run = begin_run(store, settings, daemon.bundle, None)
    failpoint("start.run_begun")
    due_by = store.time() if daemon.once else None
    return replace(job_queue_of(store, run, settings), recorded=daemon.metrics.count, retries_due_by=due_by)


def _start_engine(daemon: Daemon, job_queue: JobQueue, retry: RetryPolicy) -> tuple[InferenceEngine, Sink]:
    engine = clocked(
        open_engine(daemon.settings.engine, daemon.settings.device, daemon.bundle), daemon.metrics.inference
    )
    retry(partial(job_queue.describe_engine, engine.device, engine_description(engine)))
    log.info("ready", engine=engine.name, device=engine.device, cascade=daemon.bundle.name, pid=os.getpid())
    if daemon.bundle.lacks:
        log.warning("never_calibrated", cascade=daemon.bundle.name)
    sd_notify("READY=1")
    daemon.health.ready["models"] = True
    daemon.health.runs("pipeline")
    return engine, Sink(job_queue.store, job_queue.run.cascade_id, job_queue.record)


@dataclass(slots=True)
class _Signals:
    """What the signal handlers work on. It outlasts a reload, so that no signal is lost between two daemons."""

    stop: threading.Event
    caught: list[int] = field(default_factory=list)


@contextmanager
def _signals(heartbeat: Heartbeat) -> Iterator[_Signals]:
    """SIGTERM and SIGINT stop (a second one at once), SIGHUP has the settings read again."""
    signals = _Signals(threading.Event())

    def on_stop(signum: int, _frame: object) -> None:
        if signals.caught:
            os._exit(128 + signum)
        signals.caught.append(signum)
        signals.stop.set()

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {
        signal.SIGTERM: on_stop,
        signal.SIGINT: on_stop,
        signal.SIGHUP: lambda signum, frame: heartbeat.ask_for_settings(),
    }
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
