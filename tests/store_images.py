"""Outcomes made by code, for tests of the store."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.store import Act, CascadeIdentity, ReviewAction, Run, Store, record_act
from cxrbatch.store.reviews import Recorded
from cxrbatch.types import Decision, DecodedImage, FoundFile, ImageFacts, Outcome, Prediction

LABELS = ("NORMAL", "COVID19", "PNEUMONIA", "TUBERCULOSIS")
CASCADE = CascadeIdentity("default", "1.0.0", "a" * 64, "{}", ("gate", "disease"), ("b" * 64, "c" * 64))
OTHER_CASCADE = CascadeIdentity("default", "2.0.0", "d" * 64, "{}", ("disease",), ("e" * 64,))


def begin(store: Store, cascade: CascadeIdentity = CASCADE) -> Run:
    return store.begin_run("{}", cascade, device="cpu", engine="torch", host="here", version="0.1.0")


def found(path: str, *, size: int = 1000, mtime_ns: int = 1_700_000_000_000_000_000, **more: Any) -> FoundFile:
    return FoundFile(path, size, mtime_ns, more.pop("inode", 7), **more)


def image(content: str, **facts: Any) -> DecodedImage:
    known = {"format": "dicom", "rows": 2048, "columns": 2500, "bits_stored": 12, "decoder": "made up 1"} | facts
    return DecodedImage(hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest(), ImageFacts(**known), {})


def prediction(label: str = "NORMAL", confidence: float = 0.9, **more: Any) -> Prediction:
    if label == "NOT_CHEST":
        return Prediction(label, confidence, Decision.NOT_CHEST, False, 1 - confidence)
    rest = (1 - confidence) / 3
    probabilities = {name: confidence if name == label else rest for name in LABELS}
    logits = {name: 2.0 if name == label else -1.0 for name in LABELS}
    known = {"decision": Decision.REPORTED, "is_chest": True, "gate_probability": 0.999} | more
    return Prediction(label, confidence, logits=logits, probabilities=probabilities, **known)


def scored_file(path: str, label: str = "NORMAL", confidence: float = 0.9, **more: Any) -> Outcome:
    """A file scored; its content is its path unless `content` says otherwise."""
    content = more.pop("content", path)
    facts = more.pop("facts", {})
    file = {name: more.pop(name) for name in ("size", "mtime_ns", "inode") if name in more}
    return Outcome(found(path, **file), image(content, **facts), prediction(label, confidence, **more))


def linked(path: str, content: str) -> Outcome:
    return Outcome(found(path), image(content))


def reject(path: str, code: ReasonCode = ReasonCode.NOT_AN_IMAGE, **file: Any) -> Outcome:
    return Outcome(found(path, **file), rejected=Rejected(code, f"It is {code}."))


def review(
    store: Store, image_id: int, reader: str, action: ReviewAction, label: str | None = None, **more: Any
) -> Recorded:
    """One act of a reader on an image."""
    known = {"act_id": uuid.uuid4().hex} | more
    return record_act(store, Act(image_id=image_id, reviewer=reader, action=action, label=label, **known))
