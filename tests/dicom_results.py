"""Stored results of real DICOM files, for tests that send them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.store import CascadeIdentity, Store
from cxrbatch.types import Decision, DecodedImage, FoundFile, ImageFacts, Outcome
from store_images import begin, prediction

MANIFEST = '{"stages": [{"role": "gate", "threshold": 0.5}, {"role": "disease", "threshold": 0.91}]}'
#: The failpoints of the outbox, and of its sender.
OUTBOX_POINTS = tuple(
    f"outbox.{point}"
    for point in (
        "enqueue.before_commit",
        "enqueue.committed",
        "claim.before_commit",
        "claim.committed",
        "made",
        "answered",
        "record.before_commit",
        "record.committed",
    )
)
CASCADE = CascadeIdentity("default", "1.0.0", "a" * 64, MANIFEST, ("gate", "disease"), ("b" * 64, "c" * 64))


def source(seed: int = 0, **elements: Any) -> Dataset:
    """A small image of noise: what it shows is not looked at."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 80), dtype=np.uint8)
    return as_dicom(pixels, patient=seed + 1, **elements)


def record_files(
    store: Store, files: Sequence[Path], label: str = "PNEUMONIA", cascade: CascadeIdentity = CASCADE
) -> None:
    """As if these files had been scanned: those that do not end in .dcm came as PNG."""
    run = begin(store, cascade)
    outcomes = []
    for path in files:
        data = path.read_bytes()
        facts = ImageFacts(
            format="dicom" if path.suffix == ".dcm" else "png",
            rows=96,
            columns=80,
            bits_stored=8,
            quality_flags=("polarity_suspect",),
        )
        image = DecodedImage(hashlib.sha256(data).hexdigest(), facts, {})
        status = path.stat()
        found = FoundFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        reasons = {"decision": Decision.NEEDS_REVIEW, "review_reasons": ("low_confidence",)}
        reasons |= {"label_set": (label, "COVID19"), "abnormal_probability": 0.9}
        said = prediction(label, 0.8731) if label == "NOT_CHEST" else prediction(label, 0.8731, **reasons)
        outcomes.append(Outcome(found, image, said))
    store.record(run.run_id, run.cascade_id, outcomes)


def written(folder: Path, number: int = 1, **elements: Any) -> list[Path]:
    """`number` sources in a folder (made if missing), each of a patient and a study of its own."""
    folder.mkdir(exist_ok=True)
    paths = []
    for seed in range(number):
        path = folder / f"{seed}.dcm"
        path.write_bytes(write_dicom(source(seed, **elements)))
        paths.append(path)
    return paths
