"""A real PACS for tests: Debian's Orthanc on ports of its own, with its DICOMweb plugin."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin")
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

needs_orthanc = pytest.mark.skipif(
    ORTHANC is None or not DICOMWEB.exists(), reason="needs the Debian packages orthanc and orthanc-dicomweb"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Pacs:
    """An Orthanc that can be away for a while; what it stores stays."""

    folder: Path
    dicom_port: int
    http_port: int
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, folder: Path) -> Pacs:
        folder.mkdir()
        return cls(folder, free_port(), free_port())

    @property
    def dicom(self) -> str:
        return f"dicom://ORTHANC@127.0.0.1:{self.dicom_port}?calling=CXR"

    @property
    def web(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def start(self) -> None:
        settings = {
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "DicomAet": "ORTHANC",
            "DicomPort": self.dicom_port,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomServerEnabled": True,
            "DicomAlwaysAllowStore": True,
            "Plugins": [str(DICOMWEB)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "OverwriteInstances": False,
        }
        file = self.folder / "orthanc.json"
        file.write_text(json.dumps(settings))
        assert ORTHANC is not None
        with open(self.folder / "orthanc.log", "ab") as log:
            self.process = subprocess.Popen([ORTHANC, str(file)], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.get("/system")
                return
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, self.log
                time.sleep(0.1)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            process.wait(60)

    @property
    def log(self) -> str:
        return (self.folder / "orthanc.log").read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=100) as answer:
            return json.loads(answer.read())

    def post(self, path: str, data: bytes) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data)
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.loads(answer.read())

    def instances(self) -> dict[str, dict[str, str]]:
        """What is stored, by SOPInstanceUID: its study, and a few of its values. One row an object that it keeps."""
        found: dict[str, dict[str, str]] = {}
        for one in self.get("/instances"):
            tags = self.get(f"/instances/{one}/simplified-tags")
            assert tags["SOPInstanceUID"] not in found
            found[tags["SOPInstanceUID"]] = tags
        return found

    def file(self, sop_instance_uid: str) -> bytes:
        for one in self.get("/instances"):
            if self.get(f"/instances/{one}/simplified-tags")["SOPInstanceUID"] == sop_instance_uid:
                url = f"http://127.0.0.1:{self.http_port}/instances/{one}/file"
                with urllib.request.urlopen(url, timeout=100) as answer:
                    data: bytes = answer.read()
                    return data
        raise KeyError(sop_instance_uid)
