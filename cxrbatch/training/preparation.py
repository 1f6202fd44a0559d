"""From a recipe and a folder to labelled pictures in memory, with everything that can be wrong said first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import Fatal
from cxrbatch.training.datasets import (
    Film,
    data_digest,
    find_folders,
    grouped_split,
    label_matches,
    read_films,
    split_films,
)
from cxrbatch.training.recipes import Recipe

__all__ = ["Prepared", "prepare"]

_ROOM = 1.15  # pictures are kept a little larger than the plane, so that crops lose nothing


@dataclass(frozen=True, slots=True)
class Prepared:
    """Training and validation films, decoded: greys uint8 of about the plane's size, and class numbers.

    For a gate class 1 is what passes and `classes` is that one name.
    """

    classes: tuple[str, ...]
    train: list[Film]
    train_pictures: list[NDArray[np.uint8]]
    train_labels: list[int]
    val: list[Film]
    val_pictures: list[NDArray[np.uint8]]
    val_labels: list[int]
    unreadable: list[tuple[Film, str]]
    held_out: bool  # validation is a part of the training folder, not a folder of its own
    data_sha256: str

    @property
    def outputs(self) -> int:
        return len(self.classes)


def prepare(recipe: Recipe, data: Path, limit: int | None, without_sources: Sequence[str] = ()) -> Prepared:
    """Find, split, label and read the films. `limit` keeps about so many of each split, every class in it.

    `without_sources` leaves out the training films whose source has one of these in its name.
    Raises Fatal in one sentence: no films, one class only, a class or a split without a film, an unknown source.
    """
    folders = find_folders(data, recipe.data)
    films = [film for folder in folders for film in folder.films]
    wanted = recipe.classes or {name: (name,) for name in sorted({f.label for f in films})}
    if len(wanted) < 2:
        raise Fatal(f"{data} has only the class {', '.join(wanted)}; a classifier needs at least two.")
    number = _numbers(films, wanted)
    films = [f for f in films if f.label in number]
    train, val = split_films(films, "train"), split_films(films, "val")
    held_out = recipe.validation == "split" or not val
    if held_out:
        train, val = grouped_split(train + val, recipe.validation_share, recipe.seed)
    for left_out in without_sources:
        kept = [f for f in train if left_out not in f.source]
        if len(kept) == len(train):
            raise Fatal(f"No training film in {data} has a source with '{left_out}' in its name.")
        train = kept
    train, val = (_thinned(part, number, limit) for part in (train, val))
    for name, part in (("training", train), ("validation", val)):
        there = Counter(number[f.label] for f in part)
        for c, label in enumerate(wanted):
            if not there[c]:
                there_are = ", ".join(sorted({f.label for folder in folders for f in folder.films}))
                hint = f"; its folders are {there_are}, and a recipe without [classes] takes them as they are"
                raise Fatal(f"{data} has no film of the class {label} for {name}{hint if recipe.classes else ''}.")
    longest = round(recipe.plane.size * _ROOM)
    train, train_pictures, lost = read_films(train, longest)
    val, val_pictures, lost_too = read_films(val, longest)
    train_labels, val_labels = ([number[f.label] for f in part] for part in (train, val))
    if len(set(train_labels)) < len(wanted) or len(set(val_labels)) < len(wanted):
        raise Fatal(f"Of some class in {data} no film can be read, for example {(lost + lost_too)[0][0].path}.")
    if recipe.role == "gate":
        train_labels, val_labels = ([1 - c for c in part] for part in (train_labels, val_labels))
    classes = tuple(wanted)[:1] if recipe.role == "gate" else tuple(wanted)
    digest = data_digest([*train, *val])
    return Prepared(
        classes, train, train_pictures, train_labels, val, val_pictures, val_labels, lost + lost_too, held_out, digest
    )


def _numbers(films: list[Film], wanted: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Folder label -> class number, for the labels that the recipe uses."""
    number = {}
    for label in {f.label for f in films}:
        for c, spellings in enumerate(wanted.values()):
            if any(label_matches(label, spelling) for spelling in spellings):
                number[label] = c
    return number


def _thinned(films: list[Film], number: dict[str, int], limit: int | None) -> list[Film]:
    """Every so-manieth film, class by class."""
    if limit is None or len(films) <= limit:
        return films
    kept: list[Film] = []
    for c in sorted(set(number.values())):
        these = [f for f in films if number[f.label] == c]
        share = max(2, round(limit * len(these) / len(films)))
        kept += [these[i] for i in np.linspace(0, len(these) - 1, min(share, len(these))).astype(int)]
    return kept
