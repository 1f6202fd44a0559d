"""Labelled images in folders: DIR/<class>/..., or DIR/{train,val,test}/<class>/..., or several such folders.

A folder with a labels.csv instead has its labels there.
An optional DIR/manifest.csv (path, source, group) gives the source and the patient of each image; without it, every
image is a patient of its own without a source. Every image is read by the project's own decoder, so that training sees
the same pixels as inference.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrbatch.errors import Fatal, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_file, read_grey
from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.training.tables import read_rows
from cxrbatch.types import DecodedImage, ModelInputSpec

__all__ = [
    "ROOM",
    "SPLITS",
    "ImageFolder",
    "LabelledImage",
    "data_digest",
    "find_folders",
    "grouped_split",
    "known_patients",
    "label_matches",
    "label_names",
    "leaked_images",
    "listed_paths",
    "read_decoded",
    "read_image",
    "read_images",
    "shrink",
    "split_images",
]

SPLITS = ("train", "val", "test")
ROOM = 1.15  # images are kept a little larger than the model input, so that crops lose nothing
#: The suffixes of images. Formats that the decoder does not read (.bmp to .webp) are included, so that such files are
#: listed as unreadable instead of ignored silently; README.txt and Thumbs.db are not images.
_SUFFIXES = frozenset(
    {"", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ".bmp", ".gif", ".pgm", ".ppm", ".webp"}
)
#: Spellings found in published data sets.
_SPELLINGS = {"turberculosis": "tuberculosis", "covid": "covid19"}


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One labelled file. `label` is its folder's name, as spelled there."""

    path: Path
    label: str
    split: str  # one of SPLITS; "train" where the layout has no splits
    source: str = ""
    group: str = ""  # the patient if known, else the path: images of one group are never split
    task: str = ""  # name of the labelled folder


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A folder in one of the layouts above."""

    path: Path
    images: tuple[LabelledImage, ...]

    @property
    def name(self) -> str:
        return self.path.name


def label_matches(label: str, wanted: str) -> bool:
    """Whether a folder's name means this class, ignoring case, spaces, dashes and known misspellings."""
    return _plain(label) == _plain(wanted)


def label_names(task: str, label: str, spelling: str) -> bool:
    """Whether a recipe's "label" or "task/label" is this folder, or one of the findings of a labels.csv."""
    where, _, name = spelling.rpartition("/")
    return where in ("", task) and any(label_matches(finding, name) for finding in label.split("|"))


def _plain(label: str) -> str:
    plain = "".join(c for c in label.lower() if c.isalnum())
    return _SPELLINGS.get(plain, plain)


def find_folders(data: Path, only: Sequence[str] = ()) -> list[ImageFolder]:
    """The labelled folders in `data`: `data` itself, or its subfolders (only those in `only`, if any of them exists).

    Raises Fatal if `data` has no labelled images.
    """
    if not data.is_dir():
        raise Fatal(f"The data folder {data} does not exist.")
    facts = _manifest(data)
    inside = [data / name for name in only if (data / name).is_dir()]
    if not inside and (_has_splits(data) or _holds_classes(data)):
        inside = [data]
    folders = [ImageFolder(path, tuple(_images(path, data, facts))) for path in inside or sorted(_subfolders(data))]
    found = [folder for folder in folders if folder.images]
    if not found:
        raise Fatal(f"{data} holds no labelled images; expected {data}/train/<class>/<image> or the like.")
    return found


def _has_splits(path: Path) -> bool:
    return _has_table(path) or any((path / split).is_dir() for split in SPLITS)


def _subfolders(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _holds_classes(path: Path) -> bool:
    """Whether the subfolders are classes, that is: hold images themselves. A table beside them is none."""
    return any(f.is_file() and _may_be_image(f) for folder in _subfolders(path) for f in folder.iterdir())


def _may_be_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")


def _images(path: Path, data: Path, facts: dict[str, tuple[str, str]]) -> Iterable[LabelledImage]:
    if _has_table(path):
        yield from _listed(path / "labels.csv")
        return
    splits = [s for s in SPLITS if (path / s).is_dir()]
    for split, root in [(s, path / s) for s in splits] or [("train", path)]:
        for folder in sorted(_subfolders(root)):
            for file in _files(folder):
                if _may_be_image(file):
                    place = file.relative_to(data).as_posix()
                    source, group = facts.get(place, ("", ""))
                    yield LabelledImage(file, folder.name, split, source, group or place, path.name)


def _files(folder: Path) -> list[Path]:
    """All below a folder that is to be read, sorted: also links that lead nowhere, or to a folder, which nobody can.

    Raises OSError for a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        found += [Path(root, name) for name in files]
        found += [link for name in folders if (link := Path(root, name)).is_symlink()]
    return sorted(file for file in found if not file.is_fifo())  # which would be waited for without end


def _has_table(path: Path) -> bool:
    """Whether a folder's labels are in its labels.csv; one without these two columns is somebody's own table."""
    try:
        with (path / "labels.csv").open(newline="", encoding="utf-8-sig") as lines:
            return {"path", "finding_labels"} <= set(next(csv.reader(lines), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _listed(file: Path) -> Iterable[LabelledImage]:
    """The images of a labels.csv: `path` (relative to it), `finding_labels` separated by |, and perhaps `group`.

    They are all of train.
    """
    for row in read_rows(file, "path", "finding_labels"):
        image, task = file.parent / row["path"], file.parent.name
        group = row.get("group") or f"{task}/{row['path']}"
        yield LabelledImage(image, row["finding_labels"], "train", task, group, task)


def listed_paths(file: Path) -> frozenset[str]:
    """The column `path` of a CSV file. Raises Fatal if it has none or cannot be read."""
    return frozenset(os.path.normpath(row["path"]) for row in read_rows(file, "path"))


def _manifest(data: Path) -> dict[str, tuple[str, str]]:
    """path -> (source, group), from manifest.csv in `data` or above it (a task of a larger collection)."""
    for root in (data, data.parent):
        file = root / "manifest.csv"
        if not file.is_file():
            continue
        prefix = "" if root == data else data.name + "/"
        facts: dict[str, tuple[str, str]] = {}
        for row in read_rows(file, "path"):
            if (path := os.path.normpath(row["path"])).startswith(prefix):
                told = row.get("source") or "", row.get("group") or ""
                if facts.setdefault(path.removeprefix(prefix), told) != told:
                    raise Fatal(f"{file} names {path} twice, with different sources or groups.")
        if facts and not any(os.path.exists(data / path) for path in facts):
            raise Fatal(f"{file} names no file of {root}: its paths are below that folder, as in train/NORMAL/a.png.")
        return facts
    return {}


def read_image(path: Path) -> NDArray[np.uint8]:
    """The full-size grey image (rows, columns) uint8, by the project's pixel policy. Raises Rejected, OSError."""
    return read_grey(path.read_bytes())[0]


def read_decoded(path: Path, specs: Sequence[ModelInputSpec]) -> DecodedImage:
    """What `cxrbatch scan` would decode: facts, quality flags, and (size, size) uint8 for each spec.

    Raises Rejected, OSError.
    """
    info = path.stat()
    return decode_file(os.fspath(path), info.st_size, info.st_mtime_ns, tuple(specs), Limits(), Identifiers("drop"))


def shrink(grey: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    """`grey` with its longer side at most `longest` pixels, antialiased, aspect kept."""
    rows, columns = grey.shape
    if max(rows, columns) <= longest:
        return grey
    model_input = fit_model_input(grey, ModelInputSpec(longest))
    scale = longest / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    top, left = (longest - height) // 2, (longest - width) // 2
    return model_input[top : top + height, left : left + width].copy()


def read_images(
    images: Sequence[LabelledImage], longest: int
) -> tuple[list[LabelledImage], list[NDArray[np.uint8]], list[tuple[LabelledImage, str]]]:
    """The readable images, their greys shrunk to `longest` pixels, and the other images with the reason."""
    read, arrays, unreadable = [], [], []
    for image in images:
        try:
            array = shrink(read_image(image.path), longest)
        except (Rejected, OSError) as error:
            unreadable.append((image, str(error)))
        else:
            read.append(image)
            arrays.append(array)
    return read, arrays, unreadable


def split_images(images: Sequence[LabelledImage], split: str) -> list[LabelledImage]:
    return [image for image in images if image.split == split]


def leaked_images(folders: Sequence[ImageFolder]) -> list[LabelledImage]:
    """Test images whose bytes equal a training image's. Only files with the size of a training image are read."""
    images = [image for folder in folders for image in folder.images if image.path.is_file()]  # a labels.csv may err
    tests, trained = split_images(images, "test"), split_images(images, "train")
    lengths = {image.path: image.path.stat().st_size for image in [*tests, *trained]}
    shared = {lengths[f.path] for f in tests} & {lengths[f.path] for f in trained}
    digests = {_digest(image) for image in trained if lengths[image.path] in shared}
    return [image for image in tests if lengths[image.path] in shared and _digest(image) in digests]


def known_patients(folders: Sequence[ImageFolder], learnt_from: Sequence[ImageFolder]) -> list[LabelledImage]:
    """Test images of a patient, by the groups of manifest.csv, of whom `learnt_from` has a training image."""
    learnt = {image.group for folder in learnt_from for image in split_images(folder.images, "train")}
    return [image for folder in folders for image in split_images(folder.images, "test") if image.group in learnt]


def _digest(image: LabelledImage) -> str:
    try:
        return hashlib.sha256(image.path.read_bytes()).hexdigest()
    except OSError:  # whoever reads the images says so
        return ""


def grouped_split(
    images: Sequence[LabelledImage], share: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(train, validation) with about `share` of the images in the second; a group is never split."""
    sizes = Counter(image.group or str(image.path) for image in images)
    names = sorted(sizes)
    np.random.default_rng(seed).shuffle(names)
    chosen: set[str] = set()
    count = 0
    for name in names:
        if count >= share * len(images):
            break
        chosen.add(name)
        count += sizes[name]
    held = [image for image in images if (image.group or str(image.path)) in chosen]
    return [image for image in images if (image.group or str(image.path)) not in chosen], held


def data_digest(images: Sequence[LabelledImage], told: Sequence[str] | None = None) -> str:
    """One SHA-256 of the labels, or of what is `told` of each image, and of the files' contents, in any order."""
    words = [image.label for image in images] if told is None else told
    lines = sorted(f"{word} {_digest(image)}" for word, image in zip(words, images, strict=True))
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
