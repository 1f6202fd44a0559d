"""The decision rule: from probabilities, score and flags to a label and a decision.

The cascade, evaluation and calibration all use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cxrbatch.inference.bundle import Bundle
from cxrbatch.types import Decision

__all__ = [
    "NOT_CHEST",
    "NOT_FRONTAL",
    "REVIEW_FLAGS",
    "Assessment",
    "Thresholds",
    "abnormal_probability",
    "assess",
    "frontal_by_header",
    "normal_class",
]

NOT_CHEST = "NOT_CHEST"
NOT_FRONTAL = "NOT_FRONTAL"

#: ViewPosition (0018,5101) of DICOM, PS3.3 C.8.11.5: lateral and oblique. LLD and RLD are of a patient who lies on
#: a side: the image itself is frontal.
_NOT_FRONTAL_VIEWS = frozenset(
    {"LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT", "LAO", "RAO", "LPO", "RPO", "LLO", "RLO", "OBLIQUE"}
)
_FRONTAL_VIEWS = frozenset({"AP", "PA", "LLD", "RLD"})

#: Quality flags that always send an image to review. The others (`alpha`, `colour`, `rotated`) describe an image
#: that was read completely and as intended.
REVIEW_FLAGS = frozenset(
    {
        "above_bits_stored",
        "decoder_warning",
        "extreme_aspect",
        "multi_frame",  # only the first frame or page is scored; the others are not read
        "near_constant",
        "polarity_suspect",
        "saturated",
        "tiny",
        "window_unusable",
    }
)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The thresholds of a bundle. Probabilities are calibrated (0..1)."""

    classes: tuple[str, ...]
    confidence: float  # of the likeliest class; below it: review
    gate: float | None  # from this probability on it is a chest image; None: the cascade has no gate
    gate_review_from: float = 1.0  # from this probability up to `gate`: not a chest image, but review
    frontal: float | None = None  # below this probability it is not a frontal image; None: the gate does not know
    label_set: tuple[float, ...] | None = None  # of each class: from this probability on it is in the label set

    @classmethod
    def of(cls, bundle: Bundle) -> Thresholds:
        disease, gate = bundle.disease, bundle.gate
        alone = cls(disease.classes, disease.threshold, None, label_set=disease.label_set)
        if gate is None:
            return alone
        review_from = float(gate.manifest.get("review_from", gate.threshold))
        return replace(alone, gate=gate.threshold, gate_review_from=review_from, frontal=gate.frontal_threshold)

    def is_chest(self, gate_probability: float | None) -> bool:
        """Whether it is a chest image. Without a gate, always."""
        return self.gate is None or (gate_probability is not None and gate_probability >= self.gate)

    def is_frontal(self, frontal_probability: float | None, view_position: str) -> bool:
        """Whether it is a frontal image; the header's ViewPosition decides where it says so."""
        by_header = frontal_by_header(view_position)
        if by_header is not None:
            return by_header
        return self.frontal is None or frontal_probability is None or frontal_probability >= self.frontal

    def is_scored(self, gate_probability: float | None, frontal_probability: float | None, view: str) -> bool:
        """Whether the disease model has a say."""
        return self.is_chest(gate_probability) and self.is_frontal(frontal_probability, view)


def frontal_by_header(view_position: str) -> bool | None:
    """What ViewPosition says; None where it is empty or unknown."""
    view = "".join(c for c in view_position.upper() if c.isalpha())
    return False if view in _NOT_FRONTAL_VIEWS else True if view in _FRONTAL_VIEWS else None


@dataclass(frozen=True, slots=True)
class Assessment:
    """The answer for one image, and why a person should look at it."""

    label: str  # a class, NOT_CHEST or NOT_FRONTAL
    confidence: float  # 0..1, of `label`
    decision: Decision
    review_reasons: tuple[str, ...]  # empty unless the decision is NEEDS_REVIEW
    label_set: tuple[str, ...] = ()  # empty where the disease model did not run or the bundle has no thresholds
    abnormal_probability: float | None = None  # see `abnormal_probability`


def assess(
    thresholds: Thresholds,
    *,
    gate_probability: float | None,
    probabilities: Sequence[float],
    ood_score: float | None,
    quality_flags: Iterable[str],
    frontal_probability: float | None = None,
    view_position: str = "",
    other_probability: float | None = None,
) -> Assessment:
    """Decide about one image. All numbers are finite.

    `gate_probability` is that of a chest image, None without a gate; `frontal_probability` that of a frontal one, None
    where the gate has no such output; `view_position` is the header's and decides where it is known. `probabilities`
    has one value for each of `thresholds.classes`; it is ignored, and may be empty, where the gate says no.
    `ood_score` above 1 is unlike the training data. `other_probability` is that of none of the classes: an image called
    NORMAL goes to review for it as it does for a low confidence. The flags of REVIEW_FLAGS send an image to review on
    both sides of the gate: a degraded chest image is one that the gate easily takes for something else.
    """
    flags = tuple(flag for flag in quality_flags if flag in REVIEW_FLAGS)
    if not thresholds.is_chest(gate_probability):
        assert gate_probability is not None
        unsure = gate_probability >= thresholds.gate_review_from
        reasons = (*(["gate_unsure"] if unsure else []), *flags)
        decision = Decision.NEEDS_REVIEW if reasons else Decision.NOT_CHEST
        return Assessment(NOT_CHEST, 1 - gate_probability, decision, reasons)
    if not thresholds.is_frontal(frontal_probability, view_position):
        from_header = frontal_by_header(view_position) is not None
        confidence = 1.0 if from_header or frontal_probability is None else 1 - frontal_probability
        return Assessment(NOT_FRONTAL, confidence, Decision.NEEDS_REVIEW, ("not_frontal", *flags))
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    confidence = float(probabilities[best])
    normal = normal_class(thresholds.classes)
    abnormal = None if normal is None else abnormal_probability(float(probabilities[normal]), other_probability)
    wanted = thresholds.confidence
    reasons = (
        *(["low_confidence"] if confidence < wanted else []),
        *(["possibly_abnormal"] if best == normal and confidence >= wanted > 1 - (abnormal or 0.0) else []),
        *(["unlike_training"] if ood_score is not None and ood_score > 1 else []),
        *flags,
    )
    decision = Decision.NEEDS_REVIEW if reasons else Decision.REPORTED
    return Assessment(
        thresholds.classes[best],
        confidence,
        decision,
        reasons,
        _label_set(thresholds, probabilities),
        abnormal,
    )


def abnormal_probability(normal: float, other: float | None) -> float:
    """1 - p(NORMAL) among the classes and, where the bundle knows it, what is none of the classes."""
    return 1 - normal if other is None else 1 - normal * (1 - other)


def _label_set(thresholds: Thresholds, probabilities: Sequence[float]) -> tuple[str, ...]:
    """The label and the classes whose probability reaches their threshold, most probable first."""
    if thresholds.label_set is None:
        return ()
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    chosen = [i for i in order if i == order[0] or probabilities[i] >= thresholds.label_set[i]]
    return tuple(thresholds.classes[i] for i in chosen)


def normal_class(classes: Sequence[str]) -> int | None:
    """The position of the class NORMAL, in any capitals; None where there is none."""
    return next((i for i, name in enumerate(classes) if name.upper() == "NORMAL"), None)
