"""The gate's temperature and thresholds, chosen on validation images alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.decision import NOT_CHEST
from cxrbatch.training.bundle_writer import change_stage
from cxrbatch.training.datasets import label_matches
from cxrbatch.training.metrics import best_temperature
from cxrbatch.training.scores import LATERAL, Scores

__all__ = ["calibrate_gate", "gate_threshold"]

_TOLERANCE = 0.005
_FEWEST_LATERALS = 5


def calibrate_gate(bundle: Bundle, scores: Scores, split: str) -> None:
    """Set the gate's temperature, threshold, `review_from` and, with a second output, `frontal_threshold`, in place.

    Without both kinds of image there is nothing to choose from, and nothing is changed.
    """
    gate = bundle.gate
    assert gate is not None and scores.gate is not None
    chest = np.array([not label_matches(f.label, NOT_CHEST) for f in scores.images])
    if chest.all() or not chest.any():
        return
    logit = _logit(scores.gate) * gate.temperature
    two = np.stack([np.zeros_like(logit), logit], 1)
    temperature = best_temperature(two, chest.astype(np.int64))
    threshold, unsure = gate_threshold(1 / (1 + np.exp(-logit / temperature)), chest)
    changes: dict[str, Any] = {
        "temperature": round(temperature, 4),
        "threshold": round(threshold, 4),
        "review_from": round(unsure, 4),
        "chosen_on": f"{split}: {int(chest.sum())} chest images and {int((~chest).sum())} others",
    }
    lateral = np.array([label_matches(f.label, LATERAL) for f in scores.images])
    if scores.frontal is not None and lateral.sum() >= _FEWEST_LATERALS:
        probability = 1 / (1 + np.exp(-_logit(scores.frontal) * gate.temperature / temperature))
        changes["frontal_threshold"] = round(gate_threshold(probability[chest], ~lateral[chest])[0], 4)
        changes["chosen_on"] += f"; {int(lateral.sum())} of the chest images are lateral"
    elif gate.frontal_threshold is not None:  # the same images are frontal at the new temperature
        kept = _logit(np.array(gate.frontal_threshold)) * gate.temperature / temperature
        changes["frontal_threshold"] = round(float(1 / (1 + np.exp(-kept))), 4)
    change_stage(bundle.path, "gate", changes)


def gate_threshold(probability: NDArray[np.float64], chest: NDArray[np.bool_]) -> tuple[float, float]:
    """(threshold, review_from): the threshold nearest to 0.5 that errs little more than the best one does.

    Each kind is weighed alike; half a percent is what a few hundred images can't tell apart. From `review_from` to
    the threshold an image is rejected but shown to a reader: down to the least probable chest images of validation,
    kept between a fifth and a half of the threshold.
    """
    cuts = np.unique(np.concatenate([[0.0], probability, [1.0]]))
    middles = np.append((cuts[:-1] + cuts[1:]) / 2, 0.5)
    error = np.array([(probability[chest] < m).mean() + (probability[~chest] >= m).mean() for m in middles])
    good = middles[error <= error.min() + _TOLERANCE]
    threshold = float(np.clip(good[np.abs(good - 0.5).argmin()], 0.02, 0.98))
    lowest = float(np.quantile(probability[chest], 0.001))
    return threshold, float(np.clip(lowest, threshold / 5, threshold / 2))


def _logit(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.log(np.clip(probability, 1e-12, 1)) - np.log(np.clip(1 - probability, 1e-12, 1))
    return found
