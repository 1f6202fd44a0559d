"""The interface between the cascade and an engine."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.model_spec import ModelSpec

__all__ = ["InferenceEngine", "Network"]


class Network(Protocol):
    """One loaded stage."""

    def __call__(self, model_inputs: NDArray[np.uint8], /) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Model inputs (n, size, size) -> logits (n, classes) before temperature, pooled features (n, d).

        uint8 in, float32 out. The network normalises. Outputs may be non-finite: the cascade checks them.
        """


class InferenceEngine(Protocol):
    """Something that runs networks on a device."""

    name: str  # "torch", ...
    version: str
    device: str  # where it really runs: "cpu", "cuda:0", ...
    batch_size: int  # the number of images per call that is fastest for the loaded stages

    def load(self, stage: ModelSpec) -> Network:
        """The stage's weights, ready to run."""
