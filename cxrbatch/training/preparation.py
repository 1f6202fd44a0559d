"""Load the labelled images of a recipe into memory; everything that can be wrong is checked first."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import Fatal
from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL
from cxrbatch.training.datasets import (
    ROOM,
    LabelledImage,
    data_digest,
    find_folders,
    grouped_split,
    label_matches,
    label_names,
    listed_paths,
    read_images,
    split_images,
)
from cxrbatch.training.recipes import Recipe

__all__ = ["Prepared", "prepare"]

_GATE_NUMBERS = (1, 0, 2)  # a gate's [classes] name what passes first; see `Prepared`


@dataclass(frozen=True, slots=True)
class Prepared:
    """Training and validation images, decoded: greys uint8 of about the model input's size, and class numbers.

    For a gate number 1 is what passes, 0 what is no chest image and 2 another view of the chest; `classes` has the
    name of what passes and, with another view, "FRONTAL". Numbers above those of the classes are the recipe's partial
    labels.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]  # of the class numbers, for people
    train: list[LabelledImage]
    train_arrays: list[NDArray[np.uint8]]
    train_labels: list[int]
    val: list[LabelledImage]
    val_arrays: list[NDArray[np.uint8]]
    val_labels: list[int]
    unreadable: list[tuple[LabelledImage, str]]
    held_out: dict[str, Any] | None  # what was held out of the training folder, as the manifest says it; None: nothing
    same_patients: dict[str, int]  # split -> its images of which train, by its groups, has the patient too
    data_sha256: str
    targets: NDArray[np.float32]  # (labels, outputs): what each class number, and each partial one, asks for
    smoothing: NDArray[np.float32]  # (labels,)
    shares: NDArray[np.float64]  # (labels,) of the images that a balanced epoch draws, summing to 1

    @property
    def outputs(self) -> int:
        return int(self.targets.shape[1])


def prepare(
    recipe: Recipe,
    data: Path,
    limit: int | None,
    without_sources: Sequence[str] = (),
    without_files: Path | None = None,
) -> Prepared:
    """Find, split, label and read the images. `limit` is their approximate number per split, with every class in it.

    `without_sources` excludes training images whose source contains one of these names; `without_files` is a CSV whose
    column `path` names training images to exclude.
    Raises Fatal: no images, only one class, a class or a split without an image, an unknown source, an unusable list.
    """
    if recipe.role == "findings":
        return _prepare_findings(recipe, data, limit, without_sources, without_files)
    folders = find_folders(data, recipe.data)
    images = [image for folder in folders for image in folder.images]
    wanted = recipe.classes or {name: (name,) for name in sorted({f.label for f in images})}
    if recipe.role == "gate" and len(wanted) == 3:
        *two, views = wanted
        if not any(label_matches(f.label, spelling) for f in images for spelling in wanted[views]):
            wanted = {name: wanted[name] for name in two}  # without images of other views the gate has one answer
    if recipe.role == "disease":
        _refuse_names(data, tuple(wanted))
    if len(wanted) < 2:
        raise Fatal(f"{data} has only the class {', '.join(wanted)}; a classifier needs at least two.")
    number = _numbers(images, wanted, recipe)
    images = [f for f in images if (f.task, f.label) in number]
    complete = len(wanted)
    train, val = split_images(images, "train"), split_images(images, "val")
    val = [f for f in val if number[f.task, f.label] < complete]
    held_out: dict[str, Any] | None = None
    if recipe.validation == "split" or not val:
        whole = [f for f in train if number[f.task, f.label] < complete]
        chosen = {f.group for f in grouped_split(whole, recipe.validation_share, recipe.seed)[1]}
        held = [f for f in whole if f.group in chosen]
        val = [*val, *held]
        held_out = {
            "share": recipe.validation_share,
            "seed": recipe.seed,
            "labels": [spelling for spellings in wanted.values() for spelling in spellings],
            "data_sha256": data_digest(held),
        }
        train = [f for f in train if f.group not in chosen]
    train = _without(train, data, without_sources, without_files)
    train, val = (_thinned(part, number, limit) for part in (train, val))
    for name, part in (("training", train), ("validation", val)):
        there = Counter(number[f.task, f.label] for f in part)
        for c, label in enumerate(wanted):
            if not there[c]:
                there_are = ", ".join(sorted({f.label for folder in folders for f in folder.images}))
                hint = f"; its folders are {there_are}, and a recipe without [classes] takes them as they are"
                raise Fatal(f"{data} has no image of the class {label} for {name}{hint if recipe.classes else ''}.")
    learnt = {f.group for f in train}
    shared = Counter(f.split for f in images if f.split != "train" and f.group in learnt)
    longest = round(recipe.model_input.size * ROOM)
    train, train_arrays, lost = read_images(train, longest)
    val, val_arrays, lost_too = read_images(val, longest)
    train_labels, val_labels = ([number[f.task, f.label] for f in part] for part in (train, val))
    if len({c for c in train_labels if c < complete}) < complete or len(set(val_labels)) < complete:
        raise Fatal(f"Of some class in {data} no image can be read, for example {(lost + lost_too)[0][0].path}.")
    classes = names = tuple(wanted)
    if recipe.role == "gate":
        train_labels, val_labels = ([_GATE_NUMBERS[c] for c in part] for part in (train_labels, val_labels))
        names = (f"not {names[0]}", names[0], f"{names[0]}, another view")[:complete]
        classes = (classes[0], "FRONTAL")[: complete - 1]
    return Prepared(
        classes, names, train, train_arrays, train_labels, val, val_arrays, val_labels,
        lost + lost_too, held_out, dict(shared), _digest(train, val),
        *_targets(recipe, classes, complete),
    )  # fmt: skip


def _prepare_findings(
    recipe: Recipe, data: Path, limit: int | None, without_sources: Sequence[str], without_files: Path | None
) -> Prepared:
    """Images with any number of findings each: a class number is a combination of findings, and none of them is one."""
    images = [image for folder in find_folders(data, recipe.data) for image in folder.images if image.split == "train"]
    number = {key: c for c, key in enumerate(sorted({(f.task, f.label) for f in images}))}
    targets = np.array(
        [
            [any(label_names(*key, spelling) for spelling in spellings) for spellings in recipe.classes.values()]
            for key in number
        ],
        np.float32,
    )
    for name, told in zip(recipe.classes, targets.T, strict=True):
        if told.all() or not told.any():
            raise Fatal(f"Every image in {data} has {name}, or none has it: leave it out of the recipe's [classes].")
    train, val = grouped_split(images, recipe.validation_share, recipe.seed)
    train = _without(train, data, without_sources, without_files)
    train, val = (_thinned(part, number, limit) for part in (train, val))
    longest = round(recipe.model_input.size * ROOM)
    train, train_arrays, lost = read_images(train, longest)
    val, val_arrays, lost_too = read_images(val, longest)
    if not (train and val):
        raise Fatal(f"{data} has no image to learn from or none to validate on.")
    train_labels, val_labels = ([number[f.task, f.label] for f in part] for part in (train, val))
    return Prepared(
        tuple(recipe.classes), tuple(label for _, label in number), train, train_arrays, train_labels,
        val, val_arrays, val_labels, lost + lost_too, None, {}, _digest(train, val),
        targets, np.full(len(number), recipe.label_smoothing, np.float32), np.full(len(number), 1 / len(number)),
    )  # fmt: skip


def _digest(train: list[LabelledImage], val: list[LabelledImage]) -> str:
    """Of all that decides what a run learns from and is judged on: an image that moved to val/ makes another run."""
    told = [f"{part} {f.label} {f.source}" for part, images in (("train", train), ("val", val)) for f in images]
    return data_digest([*train, *val], told)


def _refuse_names(data: Path, names: Sequence[str]) -> None:
    """Raise Fatal for names of classes that cannot be told apart, or that cannot stand in a table."""
    for name in names:
        if not name.isprintable() or "|" in name or not name.strip() or name in (NOT_CHEST, NOT_FRONTAL):
            raise Fatal(
                f"A disease model cannot have the class {name!r}: the name is a gate's answer, or has a | or what "
                f"cannot be printed. Rename the folder in {data}, or name the classes in the recipe's [classes]."
            )
    for one, other in itertools.combinations(names, 2):
        if label_matches(one, other):
            raise Fatal(
                f"The classes {one} and {other} of {data} have the same name, since capitals, spaces and signs do "
                "not count: give them one name, or two that differ in a letter."
            )


def _without(
    train: list[LabelledImage], data: Path, without_sources: Sequence[str], without_files: Path | None
) -> list[LabelledImage]:
    """The training images but those of these sources and those that the CSV names."""
    for left_out in without_sources:
        kept = [f for f in train if left_out not in f.source]
        if len(kept) == len(train):
            raise Fatal(f"No training image in {data} has a source with '{left_out}' in its name.")
        train = kept
    if without_files is not None:
        named = listed_paths(without_files)
        kept = [f for f in train if f.path.relative_to(data).as_posix() not in named]
        if len(kept) == len(train):
            raise Fatal(f"{without_files} names no training image of {data}; its paths are relative to that folder.")
        train = kept
    return train


def _targets(
    recipe: Recipe, classes: tuple[str, ...], complete: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Targets, smoothing and shares of a `Prepared`. The partial labels follow the classes."""
    if recipe.role == "gate":
        targets = np.array([[0, 0], [1, 1], [1, 0]], np.float32)[:complete, : complete - 1]
    else:
        outputs = [*classes, recipe.other] if recipe.other else classes
        allowed = [[name in one.classes for name in outputs] for one in recipe.partial]
        whole = np.eye(complete, len(outputs))
        targets = np.concatenate([whole, np.array(allowed).reshape(-1, len(outputs))]).astype(np.float32)
    smoothing = [recipe.label_smoothing] * complete + [one.smoothing for one in recipe.partial]
    partial = [one.share for one in recipe.partial]
    shares = [(1 - sum(partial)) / complete] * complete + partial
    return targets, np.array(smoothing, np.float32), np.array(shares)


def _numbers(
    images: list[LabelledImage], wanted: dict[str, tuple[str, ...]], recipe: Recipe
) -> dict[tuple[str, str], int]:
    """(task, folder's label) -> class number, for the labels that the recipe uses; a partial label goes first."""
    spelled = [*enumerate(wanted.values()), *enumerate((one.labels for one in recipe.partial), len(wanted))]
    number = {}
    for task, label in {(f.task, f.label) for f in images}:
        for c, spellings in spelled:
            if any(label_names(task, label, spelling) for spelling in spellings):
                number[task, label] = c
    return number


def _thinned(images: list[LabelledImage], number: dict[tuple[str, str], int], limit: int | None) -> list[LabelledImage]:
    """About `limit` of the images, every n-th of each class and at least two."""
    if limit is None or len(images) <= limit:
        return images
    kept: list[LabelledImage] = []
    for c in sorted(set(number.values())):
        these = [f for f in images if number[f.task, f.label] == c]
        share = max(2, round(limit * len(these) / len(images)))
        kept += [these[i] for i in np.linspace(0, len(these) - 1, min(share, len(these))).astype(int)]
    return kept
