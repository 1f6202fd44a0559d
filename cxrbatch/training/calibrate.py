"""Choose, on validation films alone, how sure a bundle may be and what it hands to a reader.

Temperature: the one that makes validation likeliest (Guo et al. 2017), on the films as they are and on
restyled copies of them, because other hospitals' films look otherwise and validation comes from the hospitals
of the training. Out of distribution: distance of whitened features of length one to the nearest class
(Lee et al. 2018).
Review: the least confident and the least familiar, as many as the reader's budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import Bundle, Ood, Stage, load_bundle
from cxrbatch.cascade import of_length_one, ood_scores
from cxrbatch.engines import open_engine
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import Fatal
from cxrbatch.training import metrics
from cxrbatch.training.augment import StyleAugmentation
from cxrbatch.training.bundle_writer import change_stage
from cxrbatch.training.datasets import Film, FilmFolder, find_folders, grouped_split, read_films, split_films
from cxrbatch.training.scores import Scores, probabilities_of, score_films, targets_of

__all__ = ["best_temperature", "calibrate", "feature_statistics", "gate_threshold", "review_thresholds"]

_MOST_FEATURES = 2500  # films whose features describe the training data: enough for a few hundred directions
_DIRECTIONS = 256
_FILMS_A_DIRECTION = 8  # fewer and a direction's variance is that of a handful of films
_GATE_TOLERANCE = 0.005
_RESTYLED_LOOK = 0.7  # twice the training's: other hospitals are further away than that


def calibrate(
    bundle: Path, data: Path, *, split: str = "val", review_share: float = 0.25, unfamiliar_share: float = 0.05
) -> None:
    """Set temperature, thresholds and out-of-distribution score of the bundle's stages, in place.

    `review_share` of the split's films is what may be sent to review in all, `unfamiliar_share` of them for
    their features alone. The training split in `data`, where there is one, describes what is familiar;
    otherwise the validation films do. Where `data` has no such split, it is the part of train/ that training held
    out. Raises Fatal when a class has no film in the split, and for the test split.
    """
    if split == "test":
        raise Fatal("Test films choose nothing: calibrate on val, or on a split of your own.")
    loaded = load_bundle(bundle)
    engine = open_engine("auto", "auto", loaded)
    folders = find_folders(data)
    films = [f for folder in folders for f in split_films(folder.films, split)] or _held_out(folders, loaded)
    scores = score_films(loaded, films, engine)
    y = targets_of(scores.films, loaded.disease.classes)
    missing = [name for c, name in enumerate(loaded.disease.classes) if not (y == c).any()]
    if missing:
        raise Fatal(f"{data} has no readable {split} film of {', '.join(missing)}: there is nothing to calibrate on.")
    known = scores.chosen(y >= 0)
    train = _training_films(folders, loaded)
    _calibrate_disease(loaded, engine, known, y[y >= 0], train, split, review_share, unfamiliar_share)
    if loaded.gate is not None and scores.gate is not None:
        _calibrate_gate(loaded, scores, split)


def _held_out(folders: Sequence[FilmFolder], bundle: Bundle) -> list[Film]:
    """The same random part of the training films that `train` kept for validation; empty if it kept none."""
    held = bundle.disease.manifest.get("training", {}).get("held_out")
    if not held:
        return []
    films = [f for folder in folders for f in split_films(folder.films, "train")]
    known = targets_of(films, bundle.disease.classes) >= 0
    return grouped_split([f for f, k in zip(films, known, strict=True) if k], held["share"], held["seed"])[1]


def _training_films(folders: Sequence[FilmFolder], bundle: Bundle) -> list[Film]:
    """Training films of the bundle's classes, evenly thinned to a few thousand."""
    films = [f for folder in folders for f in split_films(folder.films, "train")]
    known = targets_of(films, bundle.disease.classes) >= 0
    films = [f for f, k in zip(films, known, strict=True) if k]
    return films[:: max(1, -(-len(films) // _MOST_FEATURES))]


def _calibrate_disease(
    bundle: Bundle,
    engine: Engine,
    scores: Scores,
    y: NDArray[np.int64],
    train: Sequence[Film],
    split: str,
    review_share: float,
    unfamiliar_share: float,
) -> None:
    stage = bundle.disease
    restyled_logits, restyled_y = _restyled(stage, engine, scores.films)
    temperature = best_temperature(np.concatenate([scores.logits, restyled_logits]), np.concatenate([y, restyled_y]))
    if train:
        known = score_films(replace(bundle, stages=(stage,)), train, engine)  # the gate is not needed
        features, labels = known.features, targets_of(known.films, stage.classes)
    else:
        features, labels = scores.features, y
    whitening, means = feature_statistics(features, labels, len(stage.classes))
    distance = _distances(scores.features, whitening, means)
    confidence = probabilities_of(scores.logits, temperature).max(1)
    threshold, far = review_thresholds(confidence, distance, review_share, unfamiliar_share)
    p = probabilities_of(scores.logits, temperature)
    change_stage(
        bundle.path,
        "disease",
        {
            "temperature": round(temperature, 4),
            "threshold": round(threshold, 4),
            "chosen_on": f"{split}: {len(y)} films as they are, and as many restyled copies for the temperature",
            "calibration": {
                "ece_before": metrics.calibration_error(y, scores.probabilities),
                "ece_after": metrics.calibration_error(y, p),
                "accuracy": float((p.argmax(1) == y).mean()),
                "balanced_accuracy": metrics.balanced_accuracy(y, p.argmax(1)),
                "accuracy_restyled": float((restyled_logits.argmax(1) == restyled_y).mean()),
                "sent_to_review": float(((confidence < threshold) | (distance > far)).mean()),
                "familiar_films": len(labels),
            },
        },
        (whitening, means, far),
    )


def _restyled(
    stage: Stage, engine: Engine, films: Sequence[Film], seed: int = 11
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (n, k) and classes (n,) of the films in other looks, drawn with a fixed seed."""
    rng = np.random.default_rng(seed)
    read, pictures, _ = read_films(films, round(stage.plane.size * 1.15))
    change = StyleAugmentation(stage.plane.size, look=_RESTYLED_LOOK)
    planes = [change(p, pictures[int(rng.integers(len(pictures)))], rng) for p in pictures]
    run = engine.load(stage)
    logits = [run(np.stack(planes[i : i + 32]))[0] for i in range(0, len(planes), 32)]
    return np.concatenate(logits).astype(np.float64), targets_of(read, stage.classes)


def best_temperature(logits: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood, by golden-section search on its logarithm.

    logits (n, k), y (n,); the answer is between 1/20 and 20.
    """

    def loss(log_t: float) -> float:
        z = logits / np.exp(log_t)
        z = z - z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean())

    low, high = -np.log(20), np.log(20)
    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-5:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def feature_statistics(
    features: NDArray[np.float32], y: NDArray[np.int64], classes: int, directions: int = _DIRECTIONS
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whitening (k, d) of the covariance within classes, and the whitened class means (classes, k).

    Of features (n, d) scaled to length one, as `cascade.ood_scores` scales them. Only the
    `directions` of largest variance are kept; the rest is noise with so few films.
    """
    x = of_length_one(features.astype(np.float64))
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    centred = x - means[y]
    values, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(x) - classes))
    k = min(directions, max(1, (len(x) - classes) // _FILMS_A_DIRECTION), x.shape[1])
    top = slice(len(values) - k, None)
    whitening = vectors[:, top].T / np.sqrt(values[top] + 1e-3 * values[-1])[:, None]
    return whitening.astype(np.float32), (means @ whitening.T).astype(np.float32)


def _distances(
    features: NDArray[np.float32], whitening: NDArray[np.float32], means: NDArray[np.float32]
) -> NDArray[np.float64]:
    return ood_scores(features, Ood(whitening, means, 1.0))


def review_thresholds(
    confidence: NDArray[np.float64], distance: NDArray[np.float64], review_share: float, unfamiliar_share: float
) -> tuple[float, float]:
    """(confidence below which, distance above which) films go to review, together `review_share` of them."""
    far = float(np.quantile(distance, 1 - unfamiliar_share))
    spare = int(review_share * len(confidence)) - int((distance > far).sum())
    near = np.sort(confidence[distance <= far])
    return float(near[min(max(spare, 0), len(near) - 1)]), far


def _calibrate_gate(bundle: Bundle, scores: Scores, split: str) -> None:
    gate = bundle.gate
    assert gate is not None and scores.gate is not None
    chest = np.array([f.label != "NOT_CHEST" for f in scores.films])
    if chest.all() or not chest.any():
        return  # without both kinds there is nothing to choose from
    logit = np.log(np.clip(scores.gate, 1e-12, 1)) - np.log(np.clip(1 - scores.gate, 1e-12, 1))
    logit = logit * gate.temperature
    two = np.stack([np.zeros_like(logit), logit], 1)
    temperature = best_temperature(two, chest.astype(np.int64))
    threshold, unsure = gate_threshold(1 / (1 + np.exp(-logit / temperature)), chest)
    change_stage(
        bundle.path,
        "gate",
        {
            "temperature": round(temperature, 4),
            "threshold": round(threshold, 4),
            "review_from": round(unsure, 4),
            "chosen_on": f"{split}: {int(chest.sum())} chest films and {int((~chest).sum())} others",
        },
    )


def gate_threshold(probability: NDArray[np.float64], chest: NDArray[np.bool_]) -> tuple[float, float]:
    """(threshold, review_from): the threshold nearest to 0.5 that errs little more than the best one does.

    Each kind is weighed alike; half a percent is what a few hundred films can't tell apart. From `review_from` to
    the threshold a film is rejected but shown to a reader: down to the least probable chest films of validation,
    kept between a fifth and a half of the threshold.
    """
    cuts = np.unique(np.concatenate([[0.0], probability, [1.0]]))
    middles = np.append((cuts[:-1] + cuts[1:]) / 2, 0.5)
    error = np.array([(probability[chest] < m).mean() + (probability[~chest] >= m).mean() for m in middles])
    good = middles[error <= error.min() + _GATE_TOLERANCE]
    threshold = float(np.clip(good[np.abs(good - 0.5).argmin()], 0.02, 0.98))
    lowest = float(np.quantile(probability[chest], 0.001))
    return threshold, float(np.clip(lowest, threshold / 5, threshold / 2))
