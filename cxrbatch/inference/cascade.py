"""Stage 4, cascade: run the gate, then the disease model on chest images, then decide (decision.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrbatch import unexpected
from cxrbatch.errors import Fatal, ReasonCode, Rejected, Retry
from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.decision import Thresholds, assess
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.inference.model_spec import ModelSpec, Ood
from cxrbatch.types import DecodedImage, Prediction

__all__ = ["Cascade", "gate_probabilities", "of_length_one", "ood_scores", "other_probability", "probabilities_of"]


class Cascade:
    """A bundle loaded on an engine; `score` is its only method."""

    def __init__(self, bundle: Bundle, engine: InferenceEngine) -> None:
        self.bundle = bundle
        self.engine = engine
        self._gate = engine.load(bundle.gate) if bundle.gate else None
        self._disease = engine.load(bundle.disease)
        self._thresholds = Thresholds.of(bundle)

    def score(self, images: Sequence[DecodedImage]) -> list[Prediction | Rejected]:
        """One prediction per image, in order. The disease model runs only on images that pass the gate.

        Non-finite outputs give Rejected(NON_FINITE_OUTPUT), never a label. If the engine fails, each image is tried
        alone; an image that still fails gives Retry(ENGINE_FAILED). Raises Fatal if the engine cannot continue.
        """
        if not images:
            return []
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # non-finite numbers are checked below
                return self._score(images)
        except Fatal:  # the engine cannot continue in this process
            raise
        except Exception as error:
            unexpected.report(error)
            if len(images) > 1:
                return [prediction for image in images for prediction in self.score([image])]
            why = f"The engine failed ({type(error).__name__}); the file is tried again by the next scan."
            return [Retry(ReasonCode.ENGINE_FAILED, why)]

    def _score(self, images: Sequence[DecodedImage]) -> list[Prediction | Rejected]:
        gate, disease = self.bundle.gate, self.bundle.disease
        chest: list[float | None] = [None] * len(images)
        frontal: list[float | None] = [None] * len(images)
        if gate is not None and self._gate is not None:
            logits, _ = self._gate(np.stack([image.model_inputs[gate.model_input] for image in images]))
            answers = gate_probabilities(logits, gate.temperature)
            chest = answers[:, 0].tolist()
            frontal = answers[:, 1].tolist() if answers.shape[1] > 1 else frontal
        views = [image.facts.view_position for image in images]
        passed = [self._thresholds.is_scored(*each) for each in zip(chest, frontal, views, strict=True)]
        scored = iter(self._diseases(disease, [image for image, p in zip(images, passed, strict=True) if p]))

        def prediction(
            image: DecodedImage, gate_probability: float | None, frontal_probability: float | None, is_scored: bool
        ) -> Prediction | Rejected:
            nothing = _Scored(np.empty(0, np.float32), np.empty(0), None, None)
            logits, probabilities, ood, other = next(scored) if is_scored else nothing
            if any(p is not None and np.isnan(p) for p in (gate_probability, frontal_probability)):
                return _non_finite("gate")
            if not (np.isfinite(logits).all() and all(x is None or np.isfinite(x) for x in (ood, other))):
                return _non_finite("disease model")
            found = assess(
                self._thresholds,
                gate_probability=gate_probability,
                probabilities=probabilities.tolist(),
                ood_score=ood,
                quality_flags=image.facts.quality_flags,
                frontal_probability=frontal_probability,
                view_position=image.facts.view_position,
                other_probability=other,
            )
            return Prediction(
                found.label,
                found.confidence,
                found.decision,
                None if gate_probability is None else self._thresholds.is_chest(gate_probability),
                gate_probability,
                dict(zip(disease.classes, logits.tolist(), strict=False)),  # none where the gate said no
                dict(zip(disease.classes, probabilities.tolist(), strict=False)),
                ood,
                found.review_reasons,
                found.label_set,
                found.abnormal_probability,
            )

        return [prediction(*each) for each in zip(images, chest, frontal, passed, strict=True)]

    def _diseases(self, stage: ModelSpec, images: Sequence[DecodedImage]) -> list[_Scored]:
        """What the disease model says of each image."""
        if not images:
            return []
        logits, features = self._disease(np.stack([image.model_inputs[stage.model_input] for image in images]))
        probabilities = probabilities_of(logits, stage.temperature)
        nothing = [None] * len(images)
        scores = ood_scores(features, stage.ood).tolist() if stage.ood else nothing
        other = other_probability(logits, features, stage).tolist() if stage.other else nothing
        return [_Scored(*each) for each in zip(logits, probabilities, scores, other, strict=True)]


class _Scored(NamedTuple):
    logits: NDArray[np.float32]  # (classes,)
    probabilities: NDArray[np.float64]  # (classes,), calibrated
    ood_score: float | None
    other_probability: float | None


def probabilities_of(logits: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Softmax (n, k) of logits (n, k) / temperature."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return shares


def gate_probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Sigmoids (n, outputs) of a gate's logits; NaN where a logit is not finite, whose sigmoid could be."""
    scaled = logits.astype(np.float64) / temperature
    answers: NDArray[np.float64] = np.where(np.isfinite(logits), 1 / (1 + np.exp(-scaled)), np.nan)
    return answers


def other_probability(
    logits: NDArray[np.floating[Any]], features: NDArray[np.float32], stage: ModelSpec
) -> NDArray[np.float64]:
    """Probability (n,) that an image is none of the classes, from logits (n, k) and features (n, d).

    It is one more output of the same softmax, which training asks for on images of other findings.
    """
    assert stage.other is not None
    other = features.astype(np.float64) @ stage.other.weight.astype(np.float64) + stage.other.bias
    return probabilities_of(np.concatenate([logits.astype(np.float64), other[:, None]], 1), stage.temperature)[:, -1]


def ood_scores(features: NDArray[np.float32], ood: Ood) -> NDArray[np.float64]:
    """Out-of-distribution scores (n,) float64 of features (n, d): above 1 is unlike the training data.

    The score is the distance of the whitened features to the nearest class mean, in units of the bundle's threshold
    (Lee et al. 2018: Mahalanobis distance, tied covariance). Features are scaled to length one first: images of an
    unseen hospital have smaller features, so without scaling they would be nearer to every class than images of the
    known hospitals.
    """
    x = of_length_one(features) if ood.unit else features
    whitened = (x @ ood.whitening.T).astype(np.float64)
    distances = np.linalg.norm(whitened[:, None, :] - ood.means[None, :, :], axis=2)
    nearest: NDArray[np.float64] = distances.min(1) / ood.threshold
    return nearest


def of_length_one(features: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Features (n, d), each image's scaled to length one."""
    scaled: NDArray[np.floating[Any]] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return scaled


def _non_finite(what: str) -> Rejected:
    return Rejected(
        ReasonCode.NON_FINITE_OUTPUT, f"The {what} gave numbers that are not finite; the image is not scored."
    )
