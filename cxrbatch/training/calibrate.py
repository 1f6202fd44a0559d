"""Calibrate a bundle on validation images only: temperature, out-of-distribution score, review thresholds.

Temperature: maximum likelihood on validation (Guo et al. 2017), with the images as they are and restyled copies of
them, because images of other hospitals look different and validation comes from the hospitals of the training.
Out of distribution: the distance of whitened features of length one to the nearest class (Lee et al. 2018).
Review: the least confident and the least familiar images, as many as the review budget allows. Images with quality
flags are added to that.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.cascade import of_length_one, ood_scores, other_probability, probabilities_of
from cxrbatch.inference.decision import Thresholds
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.inference.model_spec import ModelSpec, Ood
from cxrbatch.training import metrics
from cxrbatch.training.augment import StyleAugmentation
from cxrbatch.training.bundle_writer import change_bundle, change_stage, changing, shift_logits, take_over
from cxrbatch.training.calibrate_gate import calibrate_gate
from cxrbatch.training.calibration_images import chosen_images, own_folders, training_images
from cxrbatch.training.class_bias import balanced_bias
from cxrbatch.training.conformal import class_thresholds, source_weights
from cxrbatch.training.datasets import ROOM, LabelledImage, find_folders, read_images, split_images
from cxrbatch.training.reference import reference_block
from cxrbatch.training.scores import (
    Scores,
    assess_each,
    is_named,
    score_images,
    targets_of,
    under_class_names,
)
from cxrbatch.training.thresholds import COVERAGE, abnormal_block, review_thresholds, rounded_down, sureness
from cxrbatch.types import Decision, ModelInputSpec

__all__ = ["calibrate", "feature_statistics"]

_DIRECTIONS = 256
_IMAGES_A_DIRECTION = 8  # fewer and a direction's variance is that of a handful of images
_RESTYLED_LOOK = 0.7  # twice the training's: other hospitals are further away than that


def calibrate(
    bundle: Path,
    data: Path,
    *,
    split: str = "val",
    review_share: float = 0.25,
    unfamiliar_share: float = 0.05,
    label_set_margin: float = 0.0,
    balance: bool = False,
) -> None:
    """Set temperature, thresholds and out-of-distribution score of the bundle's stages, in place, all or nothing.

    `review_share` is the share of the split's images that may be sent to review, `unfamiliar_share` of all images for
    their features alone. The label sets hold the right class of COVERAGE + `label_set_margin` of the split's images:
    hospitals that the split does not show get less. The training split in `data`, if it shows every class, defines what
    is familiar; otherwise the validation images do. If `data` has no such split, the part of train/ that training held
    out is used. `balance` first adds a constant to each class's logit, so that every folder of `data` counts alike
    (class_bias.py).
    Raises Fatal if a class has no image in the split or they are too few, and for the test split.
    """
    if split == "test":
        raise Fatal("Test images choose nothing: calibrate on val, or on a split of your own.", ExitCode.USAGE)
    old = load_bundle(bundle).disease  # before anything is written
    part = bundle / ".part"
    with changing(bundle):
        shutil.rmtree(part, ignore_errors=True)
        names = ["manifest.json", *(stage.weights.name for stage in load_bundle(bundle).stages)]
        part.mkdir()
        try:
            for name in names:
                shutil.copy(bundle / name, part)
            _calibrate(part, data, split, review_share, unfamiliar_share, label_set_margin, balance)
            take_over(part, bundle)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    new = load_bundle(bundle).disease
    print(f"{bundle}: temperature {old.temperature:g} -> {new.temperature:.4g}, ", end="")
    print(f"threshold {old.threshold:g} -> {new.threshold:.4g}")


def _calibrate(
    bundle: Path,
    data: Path,
    split: str,
    review_share: float,
    unfamiliar_share: float,
    label_set_margin: float,
    balance: bool,
) -> None:
    loaded = load_bundle(bundle)
    engine = open_engine("auto", "auto", loaded)
    folders = find_folders(data, own_folders(loaded.disease))
    images = chosen_images(folders, loaded, split)
    scores = score_images(loaded, images, engine)
    y = targets_of(scores.images, loaded.disease.classes)
    missing = [name for c, name in enumerate(loaded.disease.classes) if not (y == c).any()]
    if missing:
        raise Fatal(
            f"{data} has no readable {split} image of {', '.join(missing)}: each class of the bundle needs some, in a "
            "folder of its name or of one that its recipe gave it."
        )
    if balance:
        constants = balanced_bias(
            scores.logits,
            _right_answers(scores, loaded),
            [f.task for f in scores.images],
            [f.label for f in scores.images],
        )
        shift_logits(bundle, "disease", constants)
        before = loaded.disease.manifest.get("class_bias", {})
        added = zip(loaded.disease.classes, constants.tolist(), strict=True)
        change_stage(bundle, "disease", {"class_bias": {name: before.get(name, 0.0) + value for name, value in added}})
        loaded = load_bundle(bundle)
        scores = score_images(loaded, images, engine)
    known = scores.chosen(y >= 0)
    train = training_images(folders, loaded)
    _calibrate_disease(loaded, engine, known, y[y >= 0], train, split, review_share, unfamiliar_share, label_set_margin)
    if loaded.gate is not None:
        others = find_folders(data, own_folders(loaded.gate))
        if [f.path for f in others] != [f.path for f in folders]:
            images = [f for one in others for f in split_images(one.images, split)]
            scores = score_images(loaded, under_class_names(images, loaded), engine)
        calibrate_gate(loaded, scores, split)
    _write_reference(bundle, known.images, engine, split)


def _write_reference(bundle: Path, images: Sequence[LabelledImage], engine: InferenceEngine, split: str) -> None:
    """What the finished cascade says of the validation images, for drift: `reference` of the manifest."""
    found = score_images(load_bundle(bundle), images, engine)
    block = reference_block(
        [a.label for a in found.assessments],
        [str(a.decision) for a in found.assessments],
        [a.confidence for a in found.assessments],
        [None] * len(found.images) if found.ood is None else found.ood.tolist(),
        [None] * len(found.images) if found.gate is None else found.gate.tolist(),
        found.grey_mean.tolist(),
        set_name=split,
    )
    change_bundle(bundle, {"reference": block})


def _calibrate_disease(
    bundle: Bundle,
    engine: InferenceEngine,
    scores: Scores,
    y: NDArray[np.int64],
    train: Sequence[LabelledImage],
    split: str,
    review_share: float,
    unfamiliar_share: float,
    label_set_margin: float,
) -> None:
    stage = bundle.disease
    restyled_logits, restyled_y = _restyled(stage, engine, scores.images)
    both_logits, both_y = np.concatenate([scores.logits, restyled_logits]), np.concatenate([y, restyled_y])
    temperature = metrics.best_temperature(both_logits, both_y)
    features, labels = scores.features, y
    if train:
        known = score_images(replace(bundle, stages=(stage,)), train, engine)  # the gate is not needed
        of_train = targets_of(known.images, stage.classes)
        if len(np.unique(of_train)) == len(stage.classes):
            features, labels = known.features, of_train
    with np.errstate(divide="ignore", invalid="ignore"):  # checked below
        whitening, means = feature_statistics(features, labels, len(stage.classes))
        distance = _distances(scores.features, whitening, means)
    p = probabilities_of(scores.logits, temperature)
    other = (
        other_probability(scores.logits, scores.features, replace(stage, temperature=temperature))
        if stage.other
        else None
    )
    threshold, far = review_thresholds(sureness(stage.classes, p, other), distance, review_share, unfamiliar_share)
    if not 0 < far < np.inf:
        raise Fatal(f"The {len(y)} {split} images are too few or too alike to calibrate on: take more of each class.")
    sources = [f.source for f in scores.images]
    both_sources = [*sources, *(f"{s} restyled" for s in sources)]
    weights = source_weights(both_y, both_sources)
    sets = class_thresholds(probabilities_of(both_logits, temperature), both_y, weights, COVERAGE + label_set_margin)
    alone = Thresholds(stage.classes, threshold, gate=None)  # the gate's own thresholds are chosen later
    found = assess_each(alone, None, p, distance / far, scores.quality_flags, other=other)
    change_stage(
        bundle.path,
        "disease",
        {
            "temperature": round(temperature, 4),
            "threshold": round(threshold, 4),
            "chosen_on": f"{split}: {len(y)} images as they are, and as many restyled copies for the temperature",
            "calibration": {
                "ece_before": metrics.calibration_error(y, probabilities_of(scores.logits, 1.0)),
                "ece_after": metrics.calibration_error(y, p),
                "accuracy": float((p.argmax(1) == y).mean()),
                "balanced_accuracy": metrics.balanced_accuracy(y, p.argmax(1)),
                "accuracy_restyled": float((restyled_logits.argmax(1) == restyled_y).mean()),
                "sent_to_review": float(np.mean([a.decision is Decision.NEEDS_REVIEW for a in found])),
                "familiar_images": len(labels),
            },
            "label_set": {
                "coverage": COVERAGE,
                "coverage_of_split": round(COVERAGE + label_set_margin, 4),
                "thresholds": {name: rounded_down(t) for name, t in zip(stage.classes, sets, strict=True)},
                "chosen_on": f"{split}: every source of a class alike, as it is and restyled",
            },
            **abnormal_block(stage.classes, p, y, sources, other),
        },
        (whitening, means, far),
    )


def _right_answers(scores: Scores, bundle: Bundle) -> NDArray[np.bool_]:
    """(n, classes) which answers are right: the image's class, or those of its partial label."""
    classes = bundle.disease.classes
    right: NDArray[np.bool_] = targets_of(scores.images, classes)[:, None] == np.arange(len(classes))
    for partial in bundle.disease.manifest.get("training", {}).get("partial", ()):
        allowed = np.array([name in partial["classes"] for name in classes])
        for row, image in enumerate(scores.images):
            if is_named(image, partial["labels"]):
                right[row] = allowed
    return right


def _restyled(
    stage: ModelSpec, engine: InferenceEngine, images: Sequence[LabelledImage], seed: int = 11
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (n, k) and classes (n,) of the images in other looks, drawn with a fixed seed."""
    rng = np.random.default_rng(seed)
    read, arrays, _ = read_images(images, round(stage.model_input.size * ROOM))
    if stage.model_input.fit == "stretch":
        arrays = [fit_model_input(p, ModelInputSpec(max(p.shape), "stretch")) for p in arrays]
    change = StyleAugmentation(stage.model_input.size, look=_RESTYLED_LOOK)
    model_inputs = [change(p, arrays[int(rng.integers(len(arrays)))], rng) for p in arrays]
    run = engine.load(stage)
    logits = [run(np.stack(model_inputs[i : i + 32]))[0] for i in range(0, len(model_inputs), 32)]
    return np.concatenate(logits).astype(np.float64), targets_of(read, stage.classes)


def feature_statistics(
    features: NDArray[np.float32], y: NDArray[np.int64], classes: int, directions: int = _DIRECTIONS
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whitening (k, d) of the covariance within classes, and the whitened class means (classes, k).

    Of features (n, d) scaled to length one, as `cascade.ood_scores` scales them. Only the
    `directions` of largest variance are kept; the rest is noise with so few images.
    """
    x = of_length_one(features.astype(np.float64))
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    centred = x - means[y]
    values, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(x) - classes))
    k = min(directions, max(1, (len(x) - classes) // _IMAGES_A_DIRECTION), x.shape[1])
    top = slice(len(values) - k, None)
    whitening = vectors[:, top].T / np.sqrt(values[top] + 1e-3 * values[-1])[:, None]
    return whitening.astype(np.float32), (means @ whitening.T).astype(np.float32)


def _distances(
    features: NDArray[np.float32], whitening: NDArray[np.float32], means: NDArray[np.float32]
) -> NDArray[np.float64]:
    return ood_scores(features, Ood(whitening, means, 1.0))
