"""Training batches. Sampling and augmentation depend only on (seed, epoch, position).

So a run that was killed and resumed sees the same images as an uninterrupted one.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.training.augment import StyleAugmentation, scramble
from cxrbatch.training.preparation import Prepared
from cxrbatch.training.recipes import Augmentation, Recipe
from cxrbatch.types import ModelInputSpec

__all__ = ["EpochImages", "as_floats", "batches", "fixed_batches", "normalisation"]

_PASSES = 1  # class of a gate
_WORTH_A_WORKER = 512  # images: with fewer, a worker process costs more than it saves


class EpochImages(Dataset[tuple[Tensor, int]]):
    """The images of one epoch, in sampling order, augmented as the recipe says: (1, size, size) uint8, class."""

    def __init__(
        self,
        arrays: Sequence[NDArray[np.uint8]],
        labels: Sequence[int],
        order: NDArray[np.int64],
        spec: ModelInputSpec,
        augmentation: Augmentation,
        seed: tuple[int, int],  # the recipe's, and the epoch
    ) -> None:
        self._arrays, self._labels, self._order = arrays, labels, order
        self._spec, self._augmentation, self._seed = spec, augmentation, seed
        same = (field.name for field in fields(StyleAugmentation) if field.name != "size")
        self._style = StyleAugmentation(spec.size, **{name: getattr(augmentation, name) for name in same})

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = int(self._order[place])
        array, label = self._arrays[row], self._labels[row]
        rng = np.random.default_rng([*self._seed, place])
        if self._augmentation.scramble and label == _PASSES and rng.random() < self._augmentation.scramble:
            array, label = scramble(array, rng), 1 - _PASSES
        if self._augmentation.kind == "style":
            if self._spec.fit == "stretch":
                array = fit_model_input(array, replace(self._spec, size=max(array.shape)))
            other = self._arrays[int(self._order[int(rng.integers(len(self._order)))])]
            array = self._style(array, other, rng)
        else:
            array = fit_model_input(array, self._spec)
        return torch.from_numpy(np.array(array))[None], label


def batches(images: EpochImages, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (n, 1, side, side) uint8 and (n,) int64. A last batch of one is skipped: batch norm cannot use it."""
    worker = len(images) >= _WORTH_A_WORKER and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        images,
        size,
        num_workers=int(worker),
        multiprocessing_context="fork" if worker else None,
        prefetch_factor=6 if worker else None,
    )
    for arrays, labels in loader:
        if len(labels) > 1:
            yield arrays, labels


def fixed_batches(
    arrays: Sequence[NDArray[np.uint8]], labels: Sequence[int], spec: ModelInputSpec, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images as inference sees them, in order."""
    for start in range(0, len(arrays), size):
        model_inputs = np.stack([fit_model_input(array, spec) for array in arrays[start : start + size]])
        yield torch.from_numpy(model_inputs)[:, None], torch.tensor(labels[start : start + size])


def as_floats(model_inputs: Tensor, augmentation: Augmentation, channels: int) -> Tensor:
    """uint8 (n, 1, s, s) -> float (n, channels, s, s) in 0..1; "plain" augmentation is done here, image by image.

    Uses torch's global random state. Hue and saturation have no effect on grey images; they are included because the
    published recipe has them.
    """
    x = model_inputs.float().div_(255)
    if channels == 3:
        x = x.expand(-1, 3, -1, -1)
    a = augmentation
    if a.kind != "plain":
        return x
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(a.flip),
            v2.RandomRotation(a.rotation) if a.rotation else v2.Identity(),
            v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue),
        ]
    )
    return torch.stack([change(one) for one in x])


def normalisation(recipe: Recipe, images: Prepared) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x / 255, (channels, 1, 1) each; images are grey, so all channels are equal."""
    mean, std = 0.5, 0.5
    if recipe.normalise == "int8":
        mean = 128 / 255
    elif recipe.normalise == "dataset":
        model_inputs = fixed_batches(images.train_arrays, images.train_labels, recipe.model_input, 64)
        moments = torch.tensor([[x.double().mean(), x.double().square().mean()] for x, _ in model_inputs]) / 255
        mean = float(moments[:, 0].mean())
        std = max(1e-3, math.sqrt(max(0.0, float(moments[:, 1].mean()) / 255 - mean**2)))
    ones = torch.ones(recipe.channels, 1, 1)
    return ones * mean, ones * std
