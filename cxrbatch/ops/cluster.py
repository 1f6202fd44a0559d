"""`cxrbatch scan … --ray ADDRESS`: this process lists the files into the job queue, a Runner on each node empties it.

Ray only places and restarts processes. Who has which file in hand, what is done and what is taken over from a node that
died is in Postgres (store/leases.py); no image goes through Ray. A node that joins later gets a Runner, too.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cxrbatch.errors import ExitCode, Fatal, ReasonCode, Retry
from cxrbatch.intake.stability import settle
from cxrbatch.ops.cluster_runner import Job, Runner, Status
from cxrbatch.pipeline import Counts
from cxrbatch.settings import Settings
from cxrbatch.store import RetryPolicy, Run, Store
from cxrbatch.store.paths import CUT_MARK, path_to_text
from cxrbatch.types import FoundFile, Outcome

__all__ = ["check_cluster_settings", "connected", "distribute"]

_PLACED_S = 180.0  # until a runner has to be at work (Ray starts a process first); then there is no room for it
_POLL_S = 0.5
_OFFER = 1_000  # files in one transaction
_REACHED_S = 5.0


def check_cluster_settings(settings: Settings, *, limit: int | None, reprocess: str) -> None:
    """Raises Fatal (exit 2) for what a scan on several machines cannot do."""
    if settings.db.startswith("sqlite"):
        raise Fatal("--ray needs a store that several machines share: name a Postgres with --db.", ExitCode.USAGE)
    if limit is not None or reprocess != "none":
        raise Fatal("--ray does not go with --limit or --reprocess; leave them out.", ExitCode.USAGE)


def connected(address: str) -> Any:
    """The module ray, connected to the cluster. Raises Fatal where it is not installed or nobody answers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise Fatal("--ray needs Ray, which is not installed: pip install 'cxrbatch[ray]'.") from None
    host = urlsplit(address if "://" in address else f"//{address}")
    no_answer = f"No Ray cluster answers at {address}: check the address, and that `ray start` runs there."
    try:
        port = host.port
    except ValueError:
        port = None
    if address != "auto":
        if not host.hostname or port is None:
            raise Fatal("--ray takes HOST:PORT of the cluster's head node, or auto.", ExitCode.USAGE)
        try:
            socket.create_connection((host.hostname, port), _REACHED_S).close()
        except OSError:
            raise Fatal(no_answer) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="cxrbatch")
    except Exception as error:  # ConnectionError, RuntimeError (another version of Ray or Python), ...
        raise Fatal(f"{no_answer} ({type(error).__name__})") from None
    return ray


@dataclass(slots=True)
class _Placed:
    """A Runner and what is known of it."""

    handle: Any
    since: float  # monotonic seconds
    status: Status | None = None  # None: never answered
    asked: Any = None  # a call that is under way


@dataclass(slots=True)
class _Cluster:
    ray: Any
    job: Job
    placed_s: float
    clock: Callable[[], float] = time.monotonic
    runners: dict[str, _Placed] = field(default_factory=dict)  # by node id
    alone_since: float = field(default_factory=time.monotonic)  # when a runner was last placed anywhere

    def place(self) -> None:
        """A Runner on every node that is there and has none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in self.nodes_alive():
            name = node["NodeID"]
            if name not in self.runners and node["Resources"].get("CPU"):
                remote = self.ray.remote(Runner).options(
                    num_cpus=1,
                    max_restarts=-1,
                    max_concurrency=4,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
                )
                self.runners[name] = _Placed(remote.remote(self.job), self.clock())

    def nodes_alive(self) -> list[dict[str, Any]]:
        """The nodes that are there; Runners of others are forgotten."""
        nodes = self.ray.nodes()
        for node in nodes:
            if not node["Alive"]:
                self.runners.pop(node["NodeID"], None)
        return [node for node in nodes if node["Alive"]]

    def look(self) -> None:
        """Ask every Runner how it does. Raises Fatal when one has failed, or when none found room or a node."""
        for placed in self.runners.values():
            placed.asked = placed.asked or placed.handle.status.remote()
        if not self.runners:
            if self.clock() - self.alone_since > self.placed_s:
                raise Fatal("The cluster has no node with a CPU: add one; what is listed waits in the store.")
            time.sleep(_POLL_S)  # all nodes are gone: one may come
            return
        self.alone_since = self.clock()
        asked = [placed.asked for placed in self.runners.values()]
        self.ray.wait(asked, num_returns=len(asked), timeout=_POLL_S)
        for placed in self.runners.values():
            if self.ray.wait([placed.asked], timeout=0)[0]:
                with suppress(self.ray.exceptions.RayError):  # it is being restarted, or its node is gone
                    placed.status = self.ray.get(placed.asked)
                placed.asked = None
            if placed.status is not None and placed.status.error:
                raise Fatal(f"A node cannot work on this scan: {placed.status.error}")
        waiting = [placed for placed in self.runners.values() if placed.status is None]
        late = [placed for placed in waiting if self.clock() - placed.since > self.placed_s]
        if late and len(waiting) == len(self.runners):
            raise Fatal(
                f"The cluster has no room for {len(late)} runner(s), one CPU each: free some, or add nodes; "
                "what is listed waits in the store."
            )

    def finish(self, *, now: bool) -> None:
        for placed in self.runners.values():
            placed.handle.finish.remote(now=now)

    def counts(self, counts: Counts) -> None:
        """Sums of what the Runners that are there have done."""
        known = [placed.status.counts for placed in self.runners.values() if placed.status is not None]
        counts.known_image = sum(each.known_image for each in known)
        counts.labels = sum((each.labels for each in known), Counter[str]())
        counts.decisions = sum((each.decisions for each in known), Counter[str]())
        counts.rejected = sum((each.rejected for each in known), Counter[str]())


def _without_cut_paths(found: list[FoundFile], store: Store, run: Run) -> list[FoundFile]:
    """The files whose path the store holds whole. A node gets its paths from the store: others become rows here."""
    cut = [file for file in found if CUT_MARK in path_to_text(file.path)]
    if cut:
        problem = Retry(ReasonCode.UNREADABLE, "Its path is too long for --ray; a scan without --ray can read it.")
        store.record(
            run.run_id, run.cascade_id, [Outcome(replace(file, problem=problem), rejected=problem) for file in cut]
        )
    return [file for file in found if file not in cut] if cut else found


def _next_files(files: Iterator[FoundFile | None]) -> tuple[list[FoundFile], bool | None]:
    """Files to offer at once, and whether others follow: True: now; False: later (some still change); None: no more."""
    some: list[FoundFile] = []
    for file in files:
        if file is None:
            return some, False
        some.append(file)
        if len(some) == _OFFER:
            return some, True
    return some, None


def distribute(
    ray: Any,
    found: Iterator[FoundFile],
    store: Store,
    job: Job,
    counts: Counts,
    progress: Callable[[Counts], None],
    stop: threading.Event,
    *,
    placed_s: float = _PLACED_S,
) -> None:
    """List `found` into the job queue, and wait until the Runners have emptied it, or `stop` is set.

    `ray` is from `connected`; the connection is closed at the end. Raises Fatal when a Runner has failed, when none is
    at work `placed_s` after it was asked for, or when the store is away for a minute.
    """
    job_queue = job.queue(store)
    cluster, retry = _Cluster(ray, job, placed_s), RetryPolicy(stop=stop)
    files = settle(found, job.settings.quiet_s)
    next_look = 0.0
    try:
        while not stop.is_set():
            some, more = _next_files(files)
            if some:
                some = retry(partial(_without_cut_paths, some, store, job.run))
                with_problem = sum(file.problem is not None for file in some)
                offered = retry(partial(job_queue.offer, some, inodes_tell=False, retry_at_once=True))
                counts.unchanged += len(some) - with_problem - offered
            if more is None and not retry(partial(job_queue.unfinished, job.roots)):
                break
            if not more:
                stop.wait(max(0.0, next_look - time.monotonic()))
            if time.monotonic() >= next_look:
                cluster.place()
                cluster.look()
                cluster.counts(counts)
                progress(counts)
                next_look = time.monotonic() + _POLL_S
    finally:
        cluster.finish(now=stop.is_set())
        deadline = time.monotonic() + job.settings.drain_s + _POLL_S
        with suppress(Fatal):
            while time.monotonic() < deadline and not all(
                p.status and p.status.finished for p in cluster.runners.values()
            ):
                cluster.nodes_alive()
                cluster.look()
        cluster.counts(counts)
        for placed in cluster.runners.values():
            ray.kill(placed.handle)
        ray.shutdown()
