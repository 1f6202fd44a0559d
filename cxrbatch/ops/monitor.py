"""/metrics, /healthz and /readyz on a small HTTP server of their own, and the thread that asks the store for figures.

`serve_monitor` may be used by any daemon: it needs the metrics and the health of the process, and no store.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from cxrbatch.errors import ExitCode, Fatal, StoreDown
from cxrbatch.ops.health import Health
from cxrbatch.ops.metrics import Metrics, ReceiverMetrics
from cxrbatch.store import Store
from cxrbatch.store.backlog import read_backlog
from cxrbatch.store.connection import connect
from cxrbatch.store.migrate import demand_head

__all__ = ["Address", "StoreFigures", "free_bytes", "parse_address", "serve_monitor"]

Address = tuple[str, int]
_MOST_REQUESTS = 16  # at a time; more are dropped
_LONGEST_S = 10.0  # for a whole request and its answer, as long as Prometheus waits
_EVERY_S = 20.0  # between two questions to the store
_DISK_LOW_BYTES = 100 * 2**20  # below it the store can hardly write


def parse_address(text: str) -> Address:
    """HOST:PORT, [IPv6]:PORT or :PORT (this machine only). Raises Fatal (exit 2)."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise Fatal(f"'{text}' is no address for metrics; write HOST:PORT, e.g. 127.0.0.1:9108.", ExitCode.USAGE)
    return host or "127.0.0.1", int(port)


@contextmanager
def serve_monitor(address: str, metrics: ReceiverMetrics, health: Health) -> Iterator[Address]:
    """Serve until the block ends; yields where (port 0 takes any that is free).

    Raises Fatal where the address cannot be used, before anything else has begun.
    """
    host, port = parse_address(address)
    exposition = make_wsgi_app(metrics.registry)
    metrics.heartbeat.set_function(lambda: health.last_beat_at)
    metrics.alive.set_function(lambda: float(health.alive))

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _reply(start, "405 Method Not Allowed", {"error": "only GET"})
        if path == "/metrics":
            body: Iterable[bytes]
            try:
                body = exposition(environ, start)
            except (TypeError, ValueError):  # of prometheus_client, for a version in Accept that is none
                body = exposition({**environ, "HTTP_ACCEPT": ""}, start)
            return body
        if path == "/healthz":
            ages = {name: round(age_s, 1) for name, age_s in health.ages_s().items()}
            return _reply(start, _status(health.alive), {"alive": health.alive, "seconds_since": ages})
        if path == "/readyz":
            parts = {"alive": health.alive, **health.ready}
            return _reply(start, _status(health.is_ready), {"ready": health.is_ready, **parts})
        return _reply(start, "404 Not Found", {"error": "there are /metrics, /healthz and /readyz"})

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = make_server(host, port, answer, server_class=Server, handler_class=_Handler)
    except OSError as error:
        raise Fatal(f"Metrics cannot be served at {address}: {error.strerror}; name another HOST:PORT.") from None
    thread = threading.Thread(target=server.serve_forever, name="monitor", daemon=True)
    thread.start()
    try:
        yield host, server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(2)


def _status(good: bool) -> str:
    return "200 OK" if good else "503 Service Unavailable"


def _reply(start: Callable[..., Any], status: str, body: dict[str, Any]) -> list[bytes]:
    start(status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
    return [json.dumps(body).encode() + b"\n"]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request, but never more than a few: whoever reaches the port cannot fill the daemon."""

    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without the look-up of our own name that WSGIServer makes
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # The timeout of _Handler is of one read: a byte now and then would hold a place for ever.
        deadline = threading.Timer(_LONGEST_S, _shut_down, [request])
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is not worth a line."""


def _shut_down(request: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        request.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = 5  # seconds that a client may take to say what it wants

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are not logged."""


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Asks the store every 20 s, so that a scrape never waits for it.

    `tasks` are done each time, and may raise StoreDown: the daemon says in the store that it lives.
    """

    store: Store
    metrics: Metrics
    health: Health
    disks: Mapping[str, Callable[[], int | None]]  # free bytes by label: "store", "root0", ...
    tasks: Sequence[Callable[[], None]] = ()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        while not stop.is_set():
            self.refresh()
            stop.wait(_EVERY_S)

    def refresh(self) -> None:
        """One round: disks, tasks, queue, reviews."""
        free = {what: look() for what, look in self.disks.items()}
        for what, number in free.items():
            self.metrics.show_disk(what, number)
        store_free = free.get("store")
        self.health.ready["disk"] = store_free is None or store_free >= _DISK_LOW_BYTES
        try:
            for task in self.tasks:
                task()
            with connect(self.store.engine) as connection:
                demand_head(connection)  # somebody may have moved the schema while this program runs
            self.metrics.show_backlog(read_backlog(self.store))
            self.health.ready["store"] = True
        except (StoreDown, Fatal):
            self.metrics.show_backlog(None)
            self.health.ready["store"] = False


def free_bytes(folder: str) -> int | None:
    """Free on the disk of a folder; None where it is away."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
