"""Every number that a bundle gives for a set of labelled films, read from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import Bundle, Stage
from cxrbatch.cascade import ood_scores
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import Rejected
from cxrbatch.nouns import PlaneSpec
from cxrbatch.training.datasets import Film, label_matches, read_planes

__all__ = ["Scores", "probabilities_of", "score_films", "targets_of"]

_BATCH = 32  # pictures: bounds the memory, and suits the engines


@dataclass(frozen=True, slots=True)
class Scores:
    """What a bundle says of n films that could be read, in their order. Nothing is hidden by the gate."""

    films: tuple[Film, ...]
    unreadable: tuple[tuple[Film, str], ...]
    gate: NDArray[np.float64] | None  # (n,) calibrated probability of a chest film
    logits: NDArray[np.float64]  # (n, classes), before temperature
    probabilities: NDArray[np.float64]  # (n, classes), calibrated
    features: NDArray[np.float32]  # (n, d)
    ood: NDArray[np.float64] | None  # (n,), above 1: unlike the training data
    passed: NDArray[np.bool_]  # (n,) the gate
    review: NDArray[np.bool_]  # (n,) by confidence, by `ood`, or by a gate that is unsure

    def chosen(self, mask: NDArray[np.bool_]) -> Scores:
        """The same for the films of `mask` (n,)."""
        return Scores(
            tuple(f for f, keep in zip(self.films, mask, strict=True) if keep),
            (),
            None if self.gate is None else self.gate[mask],
            self.logits[mask],
            self.probabilities[mask],
            self.features[mask],
            None if self.ood is None else self.ood[mask],
            self.passed[mask],
            self.review[mask],
        )


def probabilities_of(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Softmax of logits (n, k) / temperature."""
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return shares


def targets_of(films: Sequence[Film], classes: Sequence[str]) -> NDArray[np.int64]:
    """The class index (n,) of each film's label; -1 where the label is none of the classes."""
    known = {f.label: -1 for f in films}
    for label in known:
        known[label] = next((i for i, name in enumerate(classes) if label_matches(label, name)), -1)
    return np.array([known[f.label] for f in films], np.int64)


def score_films(bundle: Bundle, films: Sequence[Film], engine: Engine) -> Scores:
    """Decode and score. Films that can't be read are listed with the reason, not scored."""
    gate, disease = bundle.gate, bundle.disease
    run_gate = engine.load(gate) if gate else None
    run_disease = engine.load(disease)
    read: list[Film] = []
    unreadable: list[tuple[Film, str]] = []
    chest, logits, features = [], [], []
    for start in range(0, len(films), _BATCH):
        pictures = []
        for film in films[start : start + _BATCH]:
            try:
                pictures.append(read_planes(film.path, bundle.plane_specs))
            except (Rejected, OSError) as error:
                unreadable.append((film, str(error)))
            else:
                read.append(film)
        if not pictures:
            continue
        if gate is not None and run_gate is not None:
            z, _ = run_gate(_planes(pictures, gate))
            chest.append(1 / (1 + np.exp(-z[:, 0].astype(np.float64) / gate.temperature)))
        z, f = run_disease(_planes(pictures, disease))
        logits.append(z.astype(np.float64))
        features.append(f)
    if not read:
        return _nothing(unreadable, len(disease.classes), gate is not None, disease.ood is not None)
    all_logits, all_features = np.concatenate(logits), np.concatenate(features)
    probabilities = probabilities_of(all_logits, disease.temperature)
    ood = ood_scores(all_features, disease.ood) if disease.ood else None
    doubtful = probabilities.max(1) < disease.threshold
    if ood is not None:
        doubtful |= ood > 1
    gate_probability = np.concatenate(chest) if chest else None
    passed = np.ones(len(read), bool)
    if gate is not None and gate_probability is not None:
        passed = gate_probability >= gate.threshold
        doubtful = np.where(passed, doubtful, gate_probability >= gate.manifest.get("review_from", gate.threshold))
    return Scores(
        tuple(read), tuple(unreadable), gate_probability, all_logits, probabilities, all_features, ood, passed, doubtful
    )


def _planes(pictures: Sequence[dict[PlaneSpec, NDArray[np.uint8]]], stage: Stage) -> NDArray[np.uint8]:
    return np.stack([planes[stage.plane] for planes in pictures])


def _nothing(unreadable: list[tuple[Film, str]], classes: int, gated: bool, with_ood: bool) -> Scores:
    none = np.zeros((0, classes))
    return Scores(
        (), tuple(unreadable), np.zeros(0) if gated else None, none, none, np.zeros((0, 1), np.float32),
        np.zeros(0) if with_ood else None, np.zeros(0, bool), np.zeros(0, bool),
    )  # fmt: skip
