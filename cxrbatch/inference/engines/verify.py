"""Check that a bundle, on this machine and engine, reproduces the logits recorded when it was made.

A bundle records the logits of a few synthetic model inputs (`check_logits` of each stage in the manifest). The inputs
are computed from closed formulas, so every machine has the same bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.inference.model_spec import ModelSpec

__all__ = ["check_logits", "check_model_inputs", "largest_difference"]


def check_model_inputs(size: int) -> NDArray[np.uint8]:
    """Four model inputs (4, size, size): a ramp, rings, a chest-like blob pair, and reproducible texture."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float64) / (size - 1)
    ramp = x * 255
    rings = 127.5 + 127.5 * np.sign(np.sin(20 * np.hypot(x - 0.5, y - 0.5)))
    lungs = 200 - 150 * sum(np.exp(-(((x - cx) / 0.13) ** 2) - ((y - 0.45) / 0.28) ** 2) for cx in (0.3, 0.7))
    steps = np.arange(size * size, dtype=np.uint64)
    texture = ((steps * np.uint64(2654435761)) % np.uint64(4294967296) >> np.uint64(24)).reshape(size, size)
    return np.stack([np.clip(p, 0, 255).astype(np.uint8) for p in (ramp, rings, lungs, texture)])


def check_logits(stage: ModelSpec, engine: InferenceEngine) -> NDArray[np.float32]:
    """The logits (4, classes) of the check model inputs on this engine."""
    return engine.load(stage)(check_model_inputs(stage.model_input.size))[0]


def largest_difference(stage: ModelSpec, engine: InferenceEngine) -> float | None:
    """The largest |logit - recorded logit| over the check model inputs; None where the manifest records none."""
    logits = check_logits(stage, engine)
    recorded = stage.manifest.get("check_logits")
    if recorded is None:
        return None
    try:
        return float(np.abs(logits - np.asarray(recorded, np.float32).reshape(logits.shape)).max())
    except (TypeError, ValueError):  # a manifest that somebody changed
        return float("inf")
