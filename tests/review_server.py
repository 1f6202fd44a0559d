"""A real review server over a store of synthetic images, for tests: rows without a model, files that can be read."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.store import Store
from cxrbatch.store.review_schema import Role
from cxrbatch.store.users import add_user
from cxrbatch.types import Decision, DecodedImage, FoundFile, ImageFacts, Outcome
from fork_server import LIMIT_S, Daemon, fork_server
from store_images import LABELS, begin, prediction, reject

PASSWORD = "a long enough password"
USERS = {"dr_a": Role.READER, "dr_b": Role.READER, "chief": Role.ADMIN}


def write_image(folder: Path, number: int, *, dicom: bool = False) -> Path:
    """A small synthetic chest image; `number` makes its content."""
    rng = np.random.default_rng(number)
    if dicom:
        grey = draw_chest(Chest(number, rows=320, columns=280))
        samples = np.round(grey * 3600 + 200).astype(np.uint16)
        data = write_dicom(as_dicom(samples, bits=12, patient=1, WindowCenter="2000", WindowWidth="3600"))
        path = folder / f"image_{number}.dcm"
        path.write_bytes(data)
        return path
    levels = np.linspace(0, 255, 96)[:, None] + rng.normal(0, 8, (96, 80))
    path = folder / f"image_{number}.png"
    Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(path)
    return path


def scored(path: Path, label: str, confidence: float, decision: Decision, **facts: Any) -> Outcome:
    """What a scan would have recorded of a file."""
    data, status = path.read_bytes(), path.stat()
    known = {"format": "dicom" if path.suffix == ".dcm" else "png", "rows": 96, "columns": 80, "bits_stored": 8} | facts
    image = DecodedImage(hashlib.sha256(data).hexdigest(), ImageFacts(**known), {})
    file = FoundFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    return Outcome(file, image, prediction(label, confidence, decision=decision))


def fill(store: Store, folder: Path, *, answers: list[tuple[str, float]] | None = None) -> list[int]:
    """Six images that need review (ids 1 to 6, by uncertainty), one reported, one rejected; returns the image ids."""
    folder.mkdir(exist_ok=True)
    run = begin(store)
    answers = answers or [(LABELS[number % 4], 0.30 + number / 20) for number in range(6)]
    for number, (label, confidence) in enumerate(answers):
        path = write_image(folder, number, dicom=number == 0)
        facts = {"study_instance_uid": "1.2.3", "study_date": "2026-11-20"} if number < 2 else {}
        outcome = scored(path, label, confidence, Decision.NEEDS_REVIEW, **facts)
        store.record(run.run_id, run.cascade_id, [outcome])
    reported = scored(write_image(folder, 50), "NORMAL", 0.98, Decision.REPORTED)
    store.record(run.run_id, run.cascade_id, [reported, reject(str(folder / "broken.dcm"))])
    return list(range(1, len(answers) + 1))


def make_users(store: Store) -> None:
    from cxrbatch.review.auth import hash_password

    hashed = hash_password(PASSWORD)
    for name, role in USERS.items():
        add_user(store, name, hashed, role)


@dataclass
class Server:
    """A running `cxrbatch review`."""

    db: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    address: str = ""
    process: Daemon | None = None

    def start(self) -> None:
        command = ["--db", self.db, "review", "--port", str(self.port)]
        self.process = fork_server().start(command, self.folder, os.environ | self.environment)
        deadline = time.monotonic() + LIMIT_S
        while not (opened := re.match(r"Open (http://\S+)\n", said := self.process.err.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        self.address = opened[1]
        self.port = int(re.search(r":(\d+)", self.address.removeprefix("http:"))[1])  # type: ignore[index]

    def stop(self, signum: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(LIMIT_S)


@contextmanager
def serving(db: str, folder: Path, **environment: str) -> Iterator[Server]:
    """A server over a store that is there; ended with the block."""
    server = Server(db, folder, environment)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop(signal.SIGKILL)
