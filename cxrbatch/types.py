"""The data types of the pipeline: FoundFile -> DecodedImage -> Prediction -> Outcome.

They are frozen dataclasses without behaviour. Arrays are numpy; nothing here imports torch.
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
    "ModelInputSpec",
    "Outcome",
    "Prediction",
    "to_int64",
]

INT64_MAX = 2**63 - 1


def to_int64(number: int) -> int:
    """A time stamp clamped to int64 for the job queue: int64 nanoseconds end in 2262, file systems do not."""
    return max(-INT64_MAX, min(INT64_MAX, number))


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A name in a folder, as the directory listing gives it; nothing has been opened yet."""

    path: str  # absolute; undecodable bytes as surrogates (os.fsdecode)
    size: int  # bytes
    mtime_ns: int
    inode: int
    problem: Rejected | None = None  # set if the name alone is a reason to reject it (FIFO, broken link, ...)
    version: str = ""  # of an object in a bucket (intake/remote.py); empty: a file


@dataclass(frozen=True, slots=True)
class ModelInputSpec:
    """The input image of a network: square, 8 bit, grey.

    `fit="pad"` keeps the aspect ratio and centres the image on black; `fit="stretch"` does not.
    """

    size: int  # pixels a side
    fit: Literal["pad", "stretch"] = "pad"
    interpolation: Literal["bilinear", "bicubic", "box"] = "bilinear"  # all antialiased (Pillow)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known about one content before any model runs. Fields are empty if the format does not provide them.

    They include what the reader chose: decoder, grey-scale path, inversion, quality flags.
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
    sop_instance_uid: str = ""  # UIDs and date are unchanged; empty with phi = "drop"
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    patient_id_hash: str = ""  # by the phi setting: a keyed hash by default
    accession_number_hash: str = ""
    manufacturer: str = ""
    study_date: str = ""  # ISO 8601
    decoder: str = ""  # e.g. "imagecodecs 2026.3.6 jpegls"
    grey_path: str = ""  # e.g. "rescale; voi_lut_sequence" or "percentile 0.5-99.5"
    inverted: bool = False
    grey_mean: float | None = None  # 0..255, of the whole image as the networks see it, without padding
    quality_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One decoded content: its hash, its facts, and a model input for each requested spec."""

    sha256: str  # of the file's bytes, hex
    facts: ImageFacts
    model_inputs: dict[ModelInputSpec, NDArray[np.uint8]]  # each (size, size)
    decode_s: float | None = None  # wall seconds in the decode process


class Decision(StrEnum):
    """The cascade's decision about an image."""

    REPORTED = "reported"
    NEEDS_REVIEW = "needs_review"
    NOT_CHEST = "not_chest"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The cascade's prediction for one content. Probabilities are calibrated; logits are raw.

    `label` is always set: the most likely class of a chest image, otherwise `NOT_CHEST`.
    """

    label: str
    confidence: float  # 0..1, of `label`
    decision: Decision
    is_chest: bool | None  # None: this cascade has no gate
    gate_probability: float | None  # of being a chest image
    logits: dict[str, float] = field(default_factory=dict)  # empty if the disease model did not run
    probabilities: dict[str, float] = field(default_factory=dict)
    ood_score: float | None = None  # > 1: unlike the training data
    review_reasons: tuple[
        str, ...
    ] = ()  # why needs_review: "low_confidence", "possibly_abnormal", "unlike_training", ...
    label_set: tuple[str, ...] = ()  # classes that hold the right one with the bundle's coverage; most probable first
    abnormal_probability: float | None = None  # of anything but NORMAL; None where the bundle has no such class


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one file: a prediction, a rejection, or neither if `image` is known content to be linked."""

    file: FoundFile
    image: DecodedImage | None = None  # also set for some rejections (constant images, engine failures)
    prediction: Prediction | None = None
    rejected: Rejected | None = None
