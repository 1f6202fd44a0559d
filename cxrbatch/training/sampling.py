"""Which images an epoch draws, and in which order: only (seed, epoch) decide, so a resumed run draws the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import SubsetRandomSampler

from cxrbatch.training.datasets import LabelledImage
from cxrbatch.training.preparation import Prepared
from cxrbatch.training.recipes import Phase, Recipe

__all__ = ["balanced_weights", "epoch_order"]


def epoch_order(recipe: Recipe, phase: Phase, images: Prepared, epoch: int) -> NDArray[np.int64]:
    """The order of the images: a shuffle, or balanced sampling with replacement."""
    if recipe.sampling == "shuffle":
        chance = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        return np.fromiter(SubsetRandomSampler(range(len(images.train)), chance), np.int64)
    rng = np.random.default_rng([recipe.seed, epoch, 1])
    power = recipe.source_power if phase.source_power is None else phase.source_power
    factors = [_factor(f, recipe.source_weights) for f in images.train]
    chances = balanced_weights(images.train_labels, [f.source for f in images.train], power, images.shares, factors)
    return rng.choice(len(images.train), recipe.samples or len(images.train), p=chances)


def _factor(image: LabelledImage, weights: dict[str, float]) -> float:
    """The product of the recipe's [source_weights] that name the image."""
    name = f"{image.label}/{image.source}"
    return math.prod(factor for part, factor in weights.items() if part in name)


def balanced_weights(
    labels: Sequence[int],
    sources: Sequence[str],
    source_power: float = 0.5,
    class_shares: NDArray[np.float64] | None = None,
    factors: Sequence[float] | None = None,
) -> NDArray[np.float64]:
    """Chances (n,), summing to 1: in a class each source by its size ** source_power.

    Every class is drawn alike, or by its share in `class_shares` (classes,). `factors` (n,) raise or lower an image's
    chance within its class.
    """
    keys = list(zip(labels, sources, strict=True))
    sizes = Counter(keys)
    weights = np.array([sizes[key] ** (source_power - 1) for key in keys], np.float64)
    if factors is not None:
        weights *= np.asarray(factors)
    classes = np.asarray(labels)
    weights /= np.bincount(classes, weights)[classes]
    if class_shares is not None:
        weights *= class_shares[classes]
    balanced: NDArray[np.float64] = weights / weights.sum()
    return balanced
