"""Compute all outputs of a bundle for a set of labelled image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import Rejected
from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.cascade import gate_probabilities, ood_scores, other_probability, probabilities_of
from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL, Assessment, Thresholds, assess
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.datasets import LabelledImage, label_matches, label_names, read_decoded
from cxrbatch.types import Decision, DecodedImage

__all__ = [
    "LATERAL",
    "Scores",
    "assess_each",
    "is_named",
    "score_images",
    "targets_of",
    "under_class_names",
]

LATERAL = "LATERAL"  # the label of chest images of another view

_BATCH = 32  # images: limits the memory and is fast on all engines


@dataclass(frozen=True, slots=True)
class Scores:
    """The outputs of a bundle for n readable images, in order, also for images that the gate rejects."""

    images: tuple[LabelledImage, ...]
    unreadable: tuple[tuple[LabelledImage, str], ...]
    gate: NDArray[np.float64] | None  # (n,) calibrated probability of a chest image
    frontal: NDArray[np.float64] | None  # (n,) that of a frontal one; None where the gate has no such output
    logits: NDArray[np.float64]  # (n, classes), before temperature
    probabilities: NDArray[np.float64]  # (n, classes), calibrated
    features: NDArray[np.float32]  # (n, d)
    ood: NDArray[np.float64] | None  # (n,), above 1: unlike the training data
    other: NDArray[np.float64] | None  # (n,) probability of none of the classes; None: the bundle does not know it
    quality_flags: tuple[tuple[str, ...], ...]  # (n,) as the decoder gives them
    grey_mean: NDArray[np.float64]  # (n,) 0..255
    assessments: tuple[Assessment, ...]  # (n,) what a scan would say

    @property
    def passed(self) -> NDArray[np.bool_]:
        """(n,) whether the gate takes it for a frontal chest image, so that the disease model has a say."""
        return np.array([a.label not in (NOT_CHEST, NOT_FRONTAL) for a in self.assessments], bool)

    @property
    def rejected(self) -> NDArray[np.bool_]:
        """(n,) whether the gate takes it for no chest image at all."""
        return np.array([a.label == NOT_CHEST for a in self.assessments], bool)

    @property
    def review(self) -> NDArray[np.bool_]:
        """(n,) whether a scan would send the image to review, for any reason."""
        return np.array([a.decision is Decision.NEEDS_REVIEW for a in self.assessments], bool)

    def chosen(self, mask: NDArray[np.bool_]) -> Scores:
        """The same for the images of `mask` (n,)."""
        rows = np.flatnonzero(mask)
        return Scores(
            tuple(self.images[i] for i in rows),
            (),
            None if self.gate is None else self.gate[mask],
            None if self.frontal is None else self.frontal[mask],
            self.logits[mask],
            self.probabilities[mask],
            self.features[mask],
            None if self.ood is None else self.ood[mask],
            None if self.other is None else self.other[mask],
            tuple(self.quality_flags[i] for i in rows),
            self.grey_mean[mask],
            tuple(self.assessments[i] for i in rows),
        )


def under_class_names(images: Sequence[LabelledImage], bundle: Bundle) -> list[LabelledImage]:
    """The images; where a recipe of the bundle gave a class, NOT_CHEST or LATERAL other folders, under that name.

    As training reads labels: of several classes the last one, and a partial label before all of them.
    """
    disease = bundle.disease.manifest.get("training", {})
    named: dict[str, list[str]] = disease.get("labels", {})
    partial = [spelling for one in disease.get("partial", ()) for spelling in one["labels"]]
    gate = bundle.gate.manifest.get("training", {}).get("labels", {}) if bundle.gate else {}
    others = zip((NOT_CHEST, LATERAL), list(gate.values())[1:], strict=False)  # what passes is named first
    spelled = [*reversed(named.items()), *others]

    def name_of(image: LabelledImage) -> str:
        if not is_named(image, partial):
            for name, spellings in spelled:
                if is_named(image, spellings):
                    return name
        return image.label

    names = {key: name_of(image) for image in images for key in [(image.task, image.label)]}
    return [replace(image, label=names[image.task, image.label]) for image in images]


def is_named(image: LabelledImage, spellings: Sequence[str]) -> bool:
    """Whether one of these names of a recipe is the image's folder, or one of its findings."""
    return any(label_names(image.task, image.label, spelling) for spelling in spellings)


def targets_of(images: Sequence[LabelledImage], classes: Sequence[str]) -> NDArray[np.int64]:
    """The class index (n,) of each image's label; -1 where the label is none of the classes."""
    known = {
        label: next((i for i, name in enumerate(classes) if label_matches(label, name)), -1)
        for label in {f.label for f in images}
    }
    return np.array([known[f.label] for f in images], np.int64)


def score_images(bundle: Bundle, images: Sequence[LabelledImage], engine: InferenceEngine) -> Scores:
    """Decode and score. Images that can't be read are listed with the reason, not scored."""
    gate, disease, thresholds = bundle.gate, bundle.disease, Thresholds.of(bundle)
    run_gate = engine.load(gate) if gate else None
    run_disease = engine.load(disease)
    read: list[LabelledImage] = []
    flags: list[tuple[str, ...]] = []
    views: list[str] = []
    grey_means: list[float] = []
    unreadable: list[tuple[LabelledImage, str]] = []
    # One empty batch, so that concatenation works if no image is readable.
    chest = [np.zeros((0, len(gate.classes) if gate else 1))]
    logits = [np.zeros((0, len(disease.classes)))]
    features: list[NDArray[np.float32]] = []
    for start in range(0, len(images), _BATCH):
        decoded: list[DecodedImage] = []
        for image in images[start : start + _BATCH]:
            try:
                decoded.append(read_decoded(image.path, bundle.input_specs))
            except (Rejected, OSError) as error:
                unreadable.append((image, str(error)))
            else:
                read.append(image)
        if not decoded:
            continue
        flags += [each.facts.quality_flags for each in decoded]
        views += [each.facts.view_position for each in decoded]
        grey_means += [np.nan if each.facts.grey_mean is None else each.facts.grey_mean for each in decoded]
        if gate is not None and run_gate is not None:
            z, _ = run_gate(_model_inputs(decoded, gate))
            chest.append(gate_probabilities(z, gate.temperature))
        z, f = run_disease(_model_inputs(decoded, disease))
        logits.append(z.astype(np.float64))
        features.append(f)
    all_logits = np.concatenate(logits)
    all_features = np.concatenate(features) if features else np.zeros((0, 1), np.float32)
    probabilities = probabilities_of(all_logits, disease.temperature)
    ood = None
    if disease.ood:
        ood = ood_scores(all_features, disease.ood) if features else np.zeros(0)
    other = None
    if disease.other:
        other = other_probability(all_logits, all_features, disease) if features else np.zeros(0)
    answers = np.concatenate(chest)
    gate_probability = answers[:, 0] if gate is not None else None
    frontal = answers[:, 1] if gate is not None and len(gate.classes) > 1 else None
    return Scores(
        tuple(read),
        tuple(unreadable),
        gate_probability,
        frontal,
        all_logits,
        probabilities,
        all_features,
        ood,
        other,
        tuple(flags),
        np.array(grey_means, np.float64),
        assess_each(thresholds, gate_probability, probabilities, ood, flags, frontal, views, other),
    )


def assess_each(
    thresholds: Thresholds,
    gate: NDArray[np.float64] | None,
    probabilities: NDArray[np.float64],
    ood: NDArray[np.float64] | None,
    quality_flags: Sequence[tuple[str, ...]],
    frontal: NDArray[np.float64] | None = None,
    views: Sequence[str] | None = None,
    other: NDArray[np.float64] | None = None,
) -> tuple[Assessment, ...]:
    """What a scan would decide about n images: gate (n,), probabilities (n, classes), ood (n,), flags of each.

    `frontal` (n,) is the gate's second answer, `views` the ViewPosition of each header and `other` (n,) the probability
    of none of the classes, where there are any.
    """
    nothing: list[float | None] = [None] * len(quality_flags)
    each = zip(
        nothing if gate is None else gate.tolist(),
        probabilities.tolist(),
        nothing if ood is None else ood.tolist(),
        quality_flags,
        nothing if frontal is None else frontal.tolist(),
        [""] * len(quality_flags) if views is None else views,
        nothing if other is None else other.tolist(),
        strict=True,
    )
    return tuple(
        assess(
            thresholds, gate_probability=g, probabilities=p, ood_score=d, quality_flags=q,
            frontal_probability=f, view_position=v, other_probability=o,
        )
        for g, p, d, q, f, v, o in each
    )  # fmt: skip


def _model_inputs(images: Sequence[DecodedImage], stage: ModelSpec) -> NDArray[np.uint8]:
    return np.stack([image.model_inputs[stage.model_input] for image in images])
