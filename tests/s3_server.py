"""A real S3 server (moto's), and a proxy before it for the faults of a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

#: Answers a request by its method, path and query: a status to answer instead of S3, or None.
Fault = Callable[[str, str], int | None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on to S3, and does to them what `fault` says."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.fault: Fault = lambda method, path: None
        self.slow = ""  # the body of the object of this name stops half-way
        self.pause_s = 0.0  # in the middle of every body
        self.cut: set[str] = set()  # paths whose next body ends half-way
        self.requests: list[tuple[str, str]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _pass_on(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path))
        status = self.server.fault(self.command, self.path)
        if status is not None:
            code = {403: "AccessDenied", 404: "NoSuchKey"}.get(status, "InternalError")
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        try:
            answer: Any = urlopen(Request(self.server.behind + self.path, asked or None, headers, method=self.command))
        except HTTPError as error:
            answer = error
        self._answer(answer.status, dict(answer.headers.items()), answer.read())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        length = len(body) if self.command != "HEAD" else int(headers.get("Content-Length", 0))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if self.server.slow and self.path.endswith(self.server.slow):
            self.server.ended.wait(60)
        elif self.path in self.server.cut:
            self.server.cut.discard(self.path)
        else:
            time.sleep(self.server.pause_s)
            self.wfile.write(body[half:])

    do_GET = do_HEAD = do_POST = _pass_on

    def log_message(self, *_: object) -> None:
        pass


class Bucket:
    """Puts objects past the proxy."""

    def __init__(self, s3: str, name: str) -> None:
        import boto3

        self.name = name
        self._client = boto3.client(
            "s3", endpoint_url=s3, region_name="us-east-1", aws_access_key_id="t", aws_secret_access_key="t"
        )
        self._client.create_bucket(Bucket=name)

    def put(self, key: str, data: bytes, storage_class: str = "STANDARD") -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data, StorageClass=storage_class)

    def restore(self, key: str) -> None:
        self._client.restore_object(Bucket=self.name, Key=key, RestoreRequest={"Days": 1})

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=key)


@contextmanager
def serving() -> Iterator[str]:
    """URL of an S3 server; skips where moto is not installed."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def before(s3: str) -> Iterator[Proxy]:
    """A proxy before an S3 server."""
    made = Proxy(s3)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        made.ended.set()
        made.shutdown()
        made.server_close()


def pointed_at(url: str, patch: pytest.MonkeyPatch) -> None:
    """Set the environment in which commands find the server at `url`."""
    patch.setenv("AWS_ENDPOINT_URL", url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
