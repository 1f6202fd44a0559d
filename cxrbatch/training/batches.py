"""Training batches. What is drawn and how it is changed follows from (seed, epoch, place) and nothing else,

so that a run which was killed and resumed sees what an unbroken one sees.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cxrbatch.normalize import fit_plane
from cxrbatch.nouns import PlaneSpec
from cxrbatch.training.augment import StyleAugmentation, scramble
from cxrbatch.training.recipes import Augmentation

__all__ = ["EpochFilms", "batches", "fixed_batches", "on_grid"]

_PASSES = 1  # class of a gate
_WORTH_A_WORKER = 512  # films: below this a worker process costs more than it saves


class EpochFilms(Dataset[tuple[Tensor, int]]):
    """The films of one epoch, in drawing order, changed as the recipe says: (1, size, size) uint8, class."""

    def __init__(
        self,
        pictures: Sequence[NDArray[np.uint8]],
        labels: Sequence[int],
        order: NDArray[np.int64],
        spec: PlaneSpec,
        augmentation: Augmentation,
        seed: tuple[int, int],  # the recipe's, and the epoch
    ) -> None:
        self._pictures, self._labels, self._order = pictures, labels, order
        self._spec, self._augmentation, self._seed = spec, augmentation, seed
        same = (field.name for field in fields(StyleAugmentation) if field.name != "size")
        self._style = StyleAugmentation(spec.size, **{name: getattr(augmentation, name) for name in same})

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        row = int(self._order[place])
        picture, label = self._pictures[row], self._labels[row]
        rng = np.random.default_rng([*self._seed, place])
        if self._augmentation.scramble and label == _PASSES and rng.random() < self._augmentation.scramble:
            picture, label = scramble(picture, rng), 1 - _PASSES
        if self._augmentation.kind == "style":
            other = self._pictures[int(self._order[int(rng.integers(len(self._order)))])]
            picture = self._style(picture, other, rng)
        else:
            picture = fit_plane(picture, self._spec)
        return torch.from_numpy(np.array(picture))[None], label


def batches(films: EpochFilms, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(n, 1, side, side) uint8 and (n,) int64; a last batch of one, which batch norm can't use, is left out."""
    worker = len(films) >= _WORTH_A_WORKER and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        films,
        size,
        num_workers=int(worker),
        multiprocessing_context="fork" if worker else None,
        prefetch_factor=6 if worker else None,
    )
    for pictures, labels in loader:
        if len(labels) > 1:
            yield pictures, labels


def fixed_batches(
    pictures: Sequence[NDArray[np.uint8]], labels: Sequence[int], spec: PlaneSpec, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The films as inference sees them, in order."""
    for start in range(0, len(pictures), size):
        planes = np.stack([fit_plane(picture, spec) for picture in pictures[start : start + size]])
        yield torch.from_numpy(planes)[:, None], torch.tensor(labels[start : start + size])


def on_grid(planes: Tensor, augmentation: Augmentation, channels: int) -> Tensor:
    """uint8 (n, 1, s, s) -> float (n, channels, s, s) in 0..1; "plain" augmentation is done here, film by film.

    Uses torch's own random state. Hue and saturation change nothing on grey films: they are there because the
    published recipe names them.
    """
    x = planes.float().div_(255)
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
