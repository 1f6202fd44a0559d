"""Which images `calibrate` looks at: those of a split, what `train` held out, and the training images themselves."""

from __future__ import annotations

from collections.abc import Sequence

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.datasets import (
    ImageFolder,
    LabelledImage,
    data_digest,
    grouped_split,
    split_images,
)
from cxrbatch.training.scores import is_named, targets_of, under_class_names

__all__ = ["chosen_images", "own_folders", "training_images"]

_MOST_FEATURES = 2500  # images whose features describe the training data: enough for a few hundred directions


def own_folders(stage: ModelSpec) -> tuple[str, ...]:
    """The folders of a larger collection that the stage was trained on, as the manifest names them; else all."""
    return tuple(stage.manifest.get("training", {}).get("data", ()))


def chosen_images(folders: Sequence[ImageFolder], bundle: Bundle, split: str) -> list[LabelledImage]:
    """The images of the split, and those of train/ that `train` kept for validation, under the names of classes."""
    images = [f for folder in folders for f in split_images(folder.images, split)] + _held_out(folders, bundle)
    return under_class_names(images, bundle)


def training_images(folders: Sequence[ImageFolder], bundle: Bundle) -> list[LabelledImage]:
    """Training images of the bundle's classes, evenly thinned to a few thousand."""
    images = [f for folder in folders for f in split_images(folder.images, "train")]
    images = under_class_names(images, bundle)
    known = targets_of(images, bundle.disease.classes) >= 0
    images = [f for f, k in zip(images, known, strict=True) if k]
    return images[:: max(1, -(-len(images) // _MOST_FEATURES))]


def _held_out(folders: Sequence[ImageFolder], bundle: Bundle) -> list[LabelledImage]:
    """The same random part of the training images that `train` held out for validation; empty if it held out none.

    Raises Fatal where the images are others by now: another part of them would be drawn, which `train` learnt from.
    """
    training = bundle.disease.manifest.get("training", {})
    held = training.get("held_out")
    if not held:
        return []
    images = [f for folder in folders for f in split_images(folder.images, "train")]
    if "labels" in held:  # as `prepare` drew: the labels of the classes, but the partial ones
        partial = [spelling for one in training.get("partial", ()) for spelling in one["labels"]]
        images = [f for f in images if is_named(f, held["labels"]) and not is_named(f, partial)]
    else:
        known = targets_of(images, bundle.disease.classes) >= 0
        images = [f for f, k in zip(images, known, strict=True) if k]
    chosen = grouped_split(images, held["share"], held["seed"])[1]
    if chosen and data_digest(chosen) != held.get("data_sha256", data_digest(chosen)):  # bundles of before have none
        raise Fatal(
            "The images of train/ are not those that this bundle was trained on, so that what was held out of them "
            "cannot be told: calibrate on the same images, or on a folder with val/ and without train/."
        )
    return chosen
