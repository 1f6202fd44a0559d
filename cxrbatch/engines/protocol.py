"""What the cascade asks of an engine, whatever runs underneath."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import Stage

__all__ = ["Engine", "Network"]


class Network(Protocol):
    """One loaded stage."""

    def __call__(self, planes: NDArray[np.uint8], /) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Planes (n, size, size) -> logits (n, classes) before temperature, pooled features (n, d).

        Normalisation is the network's business. Outputs may be non-finite: the cascade looks.
        """


class Engine(Protocol):
    """Something that runs networks on a device."""

    name: str  # "torch", ...
    version: str
    device: str  # what it really runs on: "cpu", "cuda:0", ...
    batch_size: int  # images in one call that suit it; of the stages that are loaded

    def load(self, stage: Stage) -> Network:
        """The stage's weights, ready to run."""
