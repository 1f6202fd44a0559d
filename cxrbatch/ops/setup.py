"""The common setup of scan, watch and receive: signals, the run's row, its job queue, which names are included."""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cxrbatch import __version__
from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.intake.discover import Wanted
from cxrbatch.intake.remote import normal_path
from cxrbatch.ops.key_file import key_file_of
from cxrbatch.settings import Settings, without_password
from cxrbatch.store import Backoff, CascadeIdentity, JobQueue, Run, Store
from cxrbatch.store.connection import store_file
from cxrbatch.store.writer_lock import LOCK_SUFFIX

__all__ = ["begin_run", "claimed_at_once", "engine_description", "identity_of", "job_queue_of", "stopping", "wanted_of"]


def identity_of(bundle: Bundle, exact: bool) -> CascadeIdentity:
    """How the store identifies a cascade. Decoding images in full (`exact`) makes it another cascade."""
    return CascadeIdentity(
        bundle.name,
        f"{bundle.version} exact" if exact else bundle.version,
        bundle.key(exact),
        json.dumps(bundle.manifest),
        tuple(stage.role for stage in bundle.stages),
        tuple(stage.sha256 for stage in bundle.stages),
    )


def begin_run(store: Store, settings: Settings, bundle: Bundle, engine: InferenceEngine | None) -> Run:
    """Write the row of this run of scan or watch; `engine` is None while no engine is open."""
    return store.begin_run(
        json.dumps({name: without_password(str(value)) for name, value in settings.model_dump().items()}),
        identity_of(bundle, settings.exact),
        device=engine.device if engine else "",
        engine=engine_description(engine) if engine else "",
        host=socket.gethostname(),
        version=__version__,
    )


def job_queue_of(store: Store, run: Run, settings: Settings) -> JobQueue:
    """The job queue of a run, for this process."""
    backoff = Backoff(settings.retry_first_s, settings.retry_most_s, settings.truncated_tries)
    owner = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
    return JobQueue(store, run, owner, settings.lease_s, backoff)


def claimed_at_once(settings: Settings) -> int:
    """Files that a process takes from the job queue in one go: enough for two batches and two files a decoder."""
    return 2 * (settings.batch_size or 8) + 2 * (settings.workers or os.cpu_count() or 1)


def engine_description(engine: InferenceEngine) -> str:
    return f"{engine.name} {engine.version}; Python {platform.python_version()}"


def wanted_of(settings: Settings, exports: Sequence[str] = ()) -> Wanted:
    """Which names are included; our own store, key file and exports are not, even inside a scanned folder."""
    ours = [normal_path(path) for path in exports]
    ours += [normal_path(str(key_file_of(settings)))]
    if store := store_file(settings.db):
        database = normal_path(str(store))
        ours += [database + suffix for suffix in ("", "-wal", "-shm", "-journal", LOCK_SUFFIX)]
    return Wanted(tuple(settings.include), tuple(settings.exclude), tuple(settings.ignore_suffixes), frozenset(ours))


@contextmanager
def stopping(stop: threading.Event) -> Iterator[dict[str, int]]:
    """SIGINT and SIGTERM set `stop`; a second one ends the process at once. Yields {'signal': number} once caught."""
    caught: dict[str, int] = {}

    def on_signal(signum: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        caught["signal"] = signum
        stop.set()

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
