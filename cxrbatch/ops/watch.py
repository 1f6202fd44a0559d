"""`cxrbatch watch`, put together: lookouts fill the ledger, the road empties it, signals end or renew it."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import signal
import socket
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cxrbatch import __version__
from cxrbatch.bell import Bell
from cxrbatch.bundles import Bundle, load_bundle
from cxrbatch.crash import crash_point
from cxrbatch.discover import roots_of
from cxrbatch.engines import open_engine
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.lookout import Lookout, Outage, claims
from cxrbatch.ops.key_file import identifiers_of
from cxrbatch.ops.logs import listen_to_everything, log, where
from cxrbatch.ops.pulse import Pulse
from cxrbatch.ops.scan import identity_of, wanted_of
from cxrbatch.ops.service_manager import tell_service_manager
from cxrbatch.ops.settings_table import without_password
from cxrbatch.pipeline import ScanCounts, watch
from cxrbatch.settings import Settings
from cxrbatch.store import Patience, Store, StoreDown, Waits, Work, only_writer
from cxrbatch.watch import Folder, Schedule

__all__ = ["run_watch"]

_REPORT_S = 60.0


@dataclass(slots=True)
class _Watch:
    """One life of the daemon between two readings of the settings."""

    settings: Settings
    bundle: Bundle
    roots: list[str]
    once: bool
    stop: threading.Event = field(default_factory=threading.Event)
    news: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    counts: ScanCounts = field(default_factory=ScanCounts)
    lookouts: list[Lookout] = field(default_factory=list)
    failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """A thread cannot go on: the whole stops, for half a daemon looks like a whole one."""
        log.critical("thread_failed", error=type(error).__name__, where=where(error.__traceback__))
        self.failure = error
        self.stop.set()


def run_watch(load: Callable[[], Settings], folders: Sequence[Path], *, once: bool, verbose: bool = False) -> ExitCode:
    """Watch until SIGTERM or SIGINT; with `once`, until everything that is there has its outcome.

    `load` reads the settings, at the start and on SIGHUP. Raises Fatal before any work when something is amiss.
    """
    settings = load()
    roots = roots_of(folders)
    for root in roots:
        if not os.path.isdir(root):
            raise Fatal(f"{root} is not a folder: `cxrbatch watch` wants folders, `cxrbatch scan` reads single files.")
    bundle = load_bundle(settings.cascade)
    with only_writer(settings.db):
        crash_point("start.locked")
        while True:
            listen_to_everything(settings.log_format, logging.DEBUG if verbose else logging.INFO)
            life = _Watch(settings, bundle, roots, once)
            pulse = Pulse(life.stop, partial(_renewed, load, settings))
            with _signals(life, pulse) as caught:
                _live(life, pulse)
            if life.failure is not None:
                raise life.failure
            if caught:
                tell_service_manager("STOPPING=1")
                return ExitCode.INTERRUPTED if caught[0] == signal.SIGINT else ExitCode.OK
            if pulse.renewed is None:
                return ExitCode.SOME_REJECTED if life.counts.rejected else ExitCode.OK
            settings, bundle = pulse.renewed
            log.info("settings_renewed")


def _renewed(load: Callable[[], Settings], now: Settings) -> tuple[Settings, Bundle]:
    """What SIGHUP asks for. Raises Fatal when the new settings cannot be worked with: the old ones stay."""
    settings = load()
    if settings.db != now.db:
        raise Fatal("The setting db has changed, and another store needs a restart: the old settings stay.")
    return settings, load_bundle(settings.cascade)


def _live(life: _Watch, pulse: Pulse) -> None:
    settings = life.settings
    patience = Patience(forever=True, stop=life.stop, tell=_store_outage(), beat=pulse.beat)
    with ExitStack() as stack:
        try:
            store = stack.enter_context(patience(partial(Store.open, settings.db)))
            work = patience(partial(_begin, life, store))
            stack.callback(_end, life, work)
            patience(work.release_everybodys if store.engine.dialect.name == "sqlite" else work.renew)
        except StoreDown:
            return  # told to stop while the store was away
        stack.callback(life.finished.set)
        stack.callback(life.stop.set)
        for task in (_renew_leases, _see_the_end):
            threading.Thread(target=_or_fail, args=(task, life, work), name=task.__name__, daemon=True).start()
        _look_out(life, work, stack)
        if settings.listen:
            _receive(life, stack)
        road = claims(
            work,
            lambda: [lookout.folder.root for lookout in life.lookouts if not lookout.paused],
            2 * (settings.batch_size or 8) + 2 * (settings.workers or os.cpu_count() or 1),
            patience=patience,
            news=life.news,
            long_paths=partial(_long_paths, life),
            enough=lambda: life.once and all(lookout.idle for lookout in life.lookouts),
        )
        with suppress(StoreDown):  # only when stopped meanwhile; what is in hand is claimed again
            watch(
                road,
                settings,
                life.bundle,
                work,
                partial(_start_engine, life),
                identifiers=identifiers_of(settings),
                patience=patience,
                counts=life.counts,
                progress=_Report(),
            )
        life.stop.set()
        for lookout in life.lookouts:
            lookout.bell.rung.set()  # wakes it
        for lookout in life.lookouts:
            lookout.join(2)


def _begin(life: _Watch, store: Store) -> Work:
    settings = life.settings
    run = store.begin_run(
        json.dumps({name: without_password(str(value)) for name, value in settings.model_dump().items()}),
        identity_of(life.bundle, settings.exact),
        device=settings.device,
        engine=f"{settings.engine}; Python {platform.python_version()}",
        host=socket.gethostname(),
        version=__version__,
    )
    crash_point("start.run_begun")
    waits = Waits(settings.retry_first_s, settings.retry_most_s, settings.truncated_tries)
    return Work(store, run, f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}", settings.lease_s, waits)


def _end(life: _Watch, work: Work) -> None:
    with suppress(StoreDown):
        released = work.release()
        work.store.end_run(work.run.run_id, {"processed": life.counts.processed})
        log.info("stopped", done=life.counts.labels.total(), rejected=life.counts.rejected.total(), held=released)


def _look_out(life: _Watch, work: Work, stack: ExitStack) -> None:
    settings = life.settings
    wanted = wanted_of(settings, work.store)
    for root in life.roots:
        bell = Bell(root, settings.poll)
        armed = bell.arm()
        stack.callback(bell.disarm)
        log.info("watching", folder=root, poll="never" if armed else f"{settings.poll_s:g} s", why=bell.why_not or "")
        lookout = Lookout(
            Folder(root, wanted, settings.quiet_s, inodes_tell=not bell.silent),
            Schedule(settings.rescan_s if armed else min(settings.poll_s, settings.rescan_s)),
            work,
            patience=Patience(forever=True, stop=life.stop),
            news=life.news,
            say=log.warning,
            fail=life.fail,
            bell=bell,
        )
        life.lookouts.append(lookout)
        lookout.start()


def _receive(life: _Watch, stack: ExitStack) -> None:
    from cxrbatch.ops.receive import receiving

    receiver = stack.enter_context(receiving(life.settings, Path(life.roots[0])))
    log.info("receiving", host=receiver.host, port=receiver.port)


def _start_engine(life: _Watch) -> Engine:
    engine = open_engine(life.settings.engine, life.settings.device, life.bundle)
    log.info("ready", engine=engine.name, device=engine.device, cascade=life.bundle.name, pid=os.getpid())
    tell_service_manager("READY=1")
    return engine


def _long_paths(life: _Watch) -> Mapping[str, str]:
    return ChainMap(*(lookout.folder.long_paths for lookout in life.lookouts))


def _or_fail(task: Callable[[_Watch, Work], None], life: _Watch, work: Work) -> None:
    try:
        task(life, work)
    except BaseException as error:
        life.fail(error)


def _renew_leases(life: _Watch, work: Work) -> None:
    while not life.finished.wait(work.lease_s / 3):
        with suppress(StoreDown):
            work.renew()


def _see_the_end(life: _Watch, work: Work) -> None:
    """Once told to stop, the work in hand has drain_s; then it is given back and the process ends."""
    life.stop.wait()
    if life.finished.wait(life.settings.drain_s):
        return
    giver = threading.Thread(target=_end, args=(life, work), daemon=True)
    giver.start()
    giver.join(1.5)  # a store that is away gets its leases back by their expiry
    log.warning("drain_cut_short", seconds=life.settings.drain_s)
    os._exit(ExitCode.OK if life.failure is None else ExitCode.FATAL)


def _store_outage() -> Outage:
    return Outage(
        lambda why: log.error("store_down", why=without_password(why)),
        lambda: log.warning("store_back"),
    )


class _Report:
    """A line a minute while there is something to tell."""

    def __init__(self) -> None:
        self._next = time.monotonic()

    def __call__(self, counts: ScanCounts) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_S
            log.info("progress", done=counts.labels.total() + counts.known_content, rejected=counts.rejected.total())


@contextmanager
def _signals(life: _Watch, pulse: Pulse) -> Iterator[list[int]]:
    """SIGTERM and SIGINT stop (a second one at once), SIGHUP has the settings read again. Yields what stopped us."""
    caught: list[int] = []

    def on_stop(signum: int, _frame: object) -> None:
        if caught:
            os._exit(128 + signum)
        caught.append(signum)
        life.stop.set()

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {
        signal.SIGTERM: on_stop,
        signal.SIGINT: on_stop,
        signal.SIGHUP: lambda signum, frame: pulse.ask_for_settings(),
    }
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
