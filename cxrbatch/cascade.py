"""Stage 4, cascade: is it a chest film? Only then: which of the classes? And is the answer to be trusted?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import Bundle, Ood, Stage
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.nouns import Decision, DecodedImage, Verdict

__all__ = ["NOT_CHEST", "REVIEW_FLAGS", "Cascade", "of_length_one", "ood_scores"]

NOT_CHEST = "NOT_CHEST"

#: Quality flags that send a film to review whatever the model says.
REVIEW_FLAGS = frozenset(
    {
        "decoder_warning",
        "extreme_aspect",
        "near_constant",
        "polarity_suspect",
        "saturated",
        "tiny",
        "window_unusable",
    }
)


class Cascade:
    """A bundle on an engine. `score` is all there is to it."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self._gate = engine.load(bundle.gate) if bundle.gate else None
        self._disease = engine.load(bundle.disease)

    def score(self, images: Sequence[DecodedImage]) -> list[Verdict | Rejected]:
        """One verdict an image, in order. The disease model runs only on what passed the gate.

        Non-finite outputs give Rejected(NON_FINITE_OUTPUT), never a label. When the engine fails, each image is
        tried by itself; what still fails gives Retry(ENGINE_FAILED).
        """
        if not images:
            return []
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # non-finite numbers are looked for, below
                return self._score(images)
        except Exception as error:
            if len(images) > 1:
                return [verdict for image in images for verdict in self.score([image])]
            why = f"The engine failed ({type(error).__name__}); the file is tried again by the next scan."
            return [Retry(ReasonCode.ENGINE_FAILED, why)]

    def _score(self, images: Sequence[DecodedImage]) -> list[Verdict | Rejected]:
        gate, disease = self.bundle.gate, self.bundle.disease
        passed = np.ones(len(images), bool)
        chest: NDArray[np.float64] | None = None
        gate_finite = passed.copy()
        if gate is not None and self._gate is not None:
            logits, _ = self._gate(np.stack([image.planes[gate.plane] for image in images]))
            gate_finite = np.isfinite(logits[:, 0])
            chest = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64) / gate.temperature))
            passed = gate_finite & (chest >= gate.threshold)
        scored = iter(self._diseases(disease, [image for image, p in zip(images, passed, strict=True) if p]))

        def verdict(i: int) -> Verdict | Rejected:
            if not gate_finite[i]:
                return _non_finite("gate")
            probability = None if chest is None else float(chest[i])
            flags = tuple(f for f in images[i].facts.quality_flags if f in REVIEW_FLAGS)
            if not passed[i]:
                assert gate is not None and probability is not None
                unsure = probability >= gate.manifest.get("review_from", gate.threshold)
                return Verdict(
                    NOT_CHEST,
                    1 - probability,
                    Decision.NEEDS_REVIEW if unsure else Decision.NOT_CHEST,
                    False,
                    probability,
                    review_reasons=("gate_unsure",) if unsure else (),
                )
            logits, probabilities, ood = next(scored)
            if not (np.isfinite(logits).all() and (ood is None or np.isfinite(ood))):
                return _non_finite("disease model")
            best = int(probabilities.argmax())
            reasons = (
                *(["low_confidence"] if probabilities[best] < disease.threshold else []),
                *(["unlike_training"] if ood is not None and ood > 1 else []),
                *flags,
            )
            return Verdict(
                disease.classes[best],
                float(probabilities[best]),
                Decision.NEEDS_REVIEW if reasons else Decision.REPORTED,
                None if chest is None else True,
                probability,
                dict(zip(disease.classes, logits.tolist(), strict=True)),
                dict(zip(disease.classes, probabilities.tolist(), strict=True)),
                ood,
                reasons,
            )

        return [verdict(i) for i in range(len(images))]

    def _diseases(
        self, stage: Stage, images: Sequence[DecodedImage]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float64], float | None]]:
        """Logits, calibrated probabilities and the out-of-distribution score of each image."""
        if not images:
            return []
        logits, features = self._disease(np.stack([image.planes[stage.plane] for image in images]))
        scaled = logits.astype(np.float64) / stage.temperature
        powers = np.exp(scaled - scaled.max(1, keepdims=True))
        probabilities = powers / powers.sum(1, keepdims=True)
        scores = ood_scores(features, stage.ood).tolist() if stage.ood else [None] * len(images)
        return list(zip(logits, probabilities, scores, strict=True))


def ood_scores(features: NDArray[np.float32], ood: Ood) -> NDArray[np.float64]:
    """How unlike the training data: distance of the whitened features (n, d) to the nearest class mean, in units
    of the bundle's threshold; above 1 is unlike. After Lee et al. 2018 (Mahalanobis distance, tied covariance).

    Features are scaled to length one first. Films of an unseen hospital excite a network less; by the plain distance
    that brings them nearer to every class, and they look more familiar than films of the known hospitals.
    """
    x = of_length_one(features) if ood.unit else features
    whitened = (x @ ood.whitening.T).astype(np.float64)
    distances = np.linalg.norm(whitened[:, None, :] - ood.means[None, :, :], axis=2)
    nearest: NDArray[np.float64] = distances.min(1) / ood.threshold
    return nearest


def of_length_one(features: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Features (n, d), each film's scaled to length one."""
    scaled: NDArray[np.floating[Any]] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return scaled


def _non_finite(what: str) -> Rejected:
    return Rejected(
        ReasonCode.NON_FINITE_OUTPUT, f"The {what} gave numbers that are not finite; the film is not scored."
    )
