"""The frozen things that travel the road: FoundFile -> DecodedImage -> Verdict -> Outcome.

They hold facts and no behaviour beyond saying what they are. Arrays are numpy; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import Rejected

__all__ = [
    "INT64_MAX",
    "Decision",
    "DecodedImage",
    "FoundFile",
    "ImageFacts",
    "Outcome",
    "PlaneSpec",
    "Verdict",
    "to_int64",
]

INT64_MAX = 2**63 - 1


def to_int64(number: int) -> int:
    """A time stamp as the ledger holds it: file systems know years (2400) that int64 nanoseconds do not."""
    return max(-INT64_MAX, min(INT64_MAX, number))


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A name in a folder, as the directory listing tells it; nothing has been opened yet."""

    path: str  # absolute; undecodable bytes as surrogates (os.fsdecode)
    size: int  # bytes
    mtime_ns: int
    inode: int
    problem: Rejected | None = None  # set when the name alone is reason enough (FIFO, broken link, ...)


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """The one small picture that a network wants: square, 8 bit, grey.

    `fit="pad"` keeps the aspect ratio and centres the film on black; `fit="stretch"` does not.
    """

    size: int  # pixels a side
    fit: Literal["pad", "stretch"] = "pad"
    interpolation: Literal["bilinear", "bicubic", "box"] = "bilinear"  # all antialiased (Pillow)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of one content, before any model saw it. Empty where the format does not say.

    Everything the reader chose is here: decoder, grey-scale path, inversion, quality flags.
    """

    format: Literal["dicom", "png", "jpeg", "tiff"]
    rows: int  # pixels, as stored
    columns: int
    bits_stored: int
    number_of_frames: int = 1
    photometric_interpretation: str = ""
    transfer_syntax_uid: str = ""
    modality: str = ""
    body_part_examined: str = ""
    view_position: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""  # as the phi setting wants it: keyed hash by default
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    patient_id_hash: str = ""
    accession_number_hash: str = ""
    manufacturer: str = ""
    study_date: str = ""  # ISO 8601
    decoder: str = ""  # e.g. "imagecodecs 2026.3.6 jpegls"
    grey_path: str = ""  # e.g. "rescale; voi_lut_sequence" or "percentile 0.5-99.5"
    inverted: bool = False
    quality_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One content, read once: its hash, its facts, and a plane for each size that was asked for."""

    sha256: str  # of the file's bytes, hex
    facts: ImageFacts
    planes: dict[PlaneSpec, NDArray[np.uint8]]  # each (size, size)


class Decision(StrEnum):
    """What the cascade makes of a film: the column people sort by."""

    REPORTED = "reported"
    NEEDS_REVIEW = "needs_review"
    NOT_CHEST = "not_chest"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the cascade says of one content. Probabilities are calibrated; logits are as they came.

    `label` is always filled: the likeliest class for a chest film, `NOT_CHEST` otherwise.
    """

    label: str
    confidence: float  # 0..1, of `label`
    decision: Decision
    is_chest: bool | None  # None: this cascade has no gate
    gate_probability: float | None  # of being a chest film
    logits: dict[str, float] = field(default_factory=dict)  # empty when the disease model did not run
    probabilities: dict[str, float] = field(default_factory=dict)
    ood_score: float | None = None  # > 1: unlike the training data
    review_reasons: tuple[str, ...] = ()  # why needs_review: "low_confidence", "unlike_training", ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of the road for one file: exactly one of a verdict and a rejection."""

    file: FoundFile
    image: DecodedImage | None = None  # also set for some rejections (constant images, engine trouble)
    verdict: Verdict | None = None
    rejected: Rejected | None = None
