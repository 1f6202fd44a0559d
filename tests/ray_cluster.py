"""A Ray cluster on this machine whose nodes can be killed as a machine dies: with everything that runs on them."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from cxrbatch.store.connection import parse_url

#: Ray's own deadlines are for machines that do nothing else. A test's processes may get a hundredth of a core.
_PATIENT = {
    "RAY_worker_niceness": "0",  # it is 15 otherwise: on a busy machine nothing would ever come of it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_timeout_ms": "120000",  # a node that is slow to answer is not dead;
    "RAY_health_check_period_ms": "1000",  # one that is dead refuses at once, five times in a row
}


@dataclass
class Nodes:
    """A head node without work, and nodes of one CPU."""

    cluster: Any
    starter: Executor  # one thread for all of them: Linux ends Ray's processes with the thread that started them
    alive: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        self.alive.append(self.starter.submit(self.cluster.add_node, num_cpus=1, **_ports()).result())

    def kill(self, node: Any) -> set[int]:
        """kill -9 for all that a node runs, its decode workers too. Returns the processes."""
        (raylet,) = node.all_processes["raylet"]
        family = [psutil.Process(raylet.process.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            with suppress(psutil.NoSuchProcess):  # it has ended with the first one
                process.kill()
        self.alive.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        return {process.pid for process in family}


def _ports() -> dict[str, int]:
    """Ports that are free now. Where none are given, a node waits for its Python helpers to find some, for 15 s, and
    ends: on a busy machine that is not enough."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("", 0))
        return {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


@contextmanager
def ray_cluster(number: int = 2) -> Iterator[Nodes]:
    """Nodes that see this process's environment as it is now; skips where Ray is not installed."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as starter:
        for name, value in _PATIENT.items():
            patch.setenv(name, value)
        # A node would set a handler of SIGTERM, which only the main thread may.
        patch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        nodes = Nodes(Cluster(initialize_head=True, head_node_args={**head, **_ports()}), starter)
        try:
            for _ in range(number):
                nodes.add()
            yield nodes
        finally:
            nodes.cluster.shutdown()


class Killer(threading.Thread):
    """Kills a node at random, `kills` times, each time while two are at work; a new one comes for each.

    `gate` is open while work may go on: it is closed until two nodes have files in hand, so that no scan is too short
    for this, on whatever machine. Used as a context: leaving it waits until all are killed, or stops after an error.
    """

    def __init__(self, nodes: Nodes, store_url: str, gate: threading.Event, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._nodes, self._gate, self._kills, self._random = nodes, gate, kills, random.Random(seed)
        self._engine = sa.create_engine(parse_url(store_url), isolation_level="AUTOCOMMIT")
        self._dead: set[int] = set()
        self._stop_event = threading.Event()
        self.held: list[int] = []  # files that each killed node had in hand
        self.failure: BaseException | None = None

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stop_event.set()
        self.join()

    def run(self) -> None:
        try:
            while len(self.held) < self._kills and not self._stop_event.wait(0.1):
                if len(self._leases().keys() - self._dead) >= 2:
                    self._kill_one()
        except BaseException as error:
            self.failure = error
        finally:
            self._gate.set()
            self._engine.dispose()

    def _kill_one(self) -> None:
        self._gate.set()
        time.sleep(self._random.uniform(0.1, 0.6))
        dead = self._nodes.kill(self._random.choice(self._nodes.alive))
        self._gate.clear()
        self._dead |= dead
        self.held.append(sum(files for pid, files in self._leases().items() if pid in dead))
        self._nodes.add()

    def _leases(self) -> dict[int, int]:
        """Files in hand, by the process of the runner."""
        query = "SELECT lease_owner, count(*) FROM files WHERE state = 'claimed' GROUP BY 1"
        with self._engine.connect() as connection:
            return {int(owner.split("/")[1]): files for owner, files in connection.execute(sa.text(query))}
