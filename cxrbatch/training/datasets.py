"""Labelled films in folders: DIR/<class>/..., or DIR/{train,val,test}/<class>/..., or several such folders.

An optional DIR/manifest.csv (path, source, group) tells where each film comes from and whose it is; without
it every film is a source-less patient of its own. Every picture is read by the project's own decoder, so that
training sees the very pixels that inference sees.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrbatch.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.errors import Fatal, Rejected
from cxrbatch.normalize import fit_plane
from cxrbatch.nouns import PlaneSpec

__all__ = [
    "SPLITS",
    "Film",
    "FilmFolder",
    "balanced_weights",
    "data_digest",
    "find_folders",
    "grouped_split",
    "label_matches",
    "leaked_films",
    "read_film",
    "read_planes",
    "shrink",
    "split_films",
]

SPLITS = ("train", "val", "test")
#: What counts as a picture. Those that the decoder has no reader for (.bmp to .webp) are then listed as unreadable,
#: not passed over in silence; README.txt and Thumbs.db beside the films are no pictures.
_SUFFIXES = frozenset(
    {"", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ".bmp", ".gif", ".pgm", ".ppm", ".webp"}
)
#: Spellings met in published sets.
_SPELLINGS = {"turberculosis": "tuberculosis", "covid": "covid19"}


@dataclass(frozen=True, slots=True)
class Film:
    """One labelled file. `label` is its folder's name, as spelled there."""

    path: Path
    label: str
    split: str  # one of SPLITS; "train" where the layout has no splits
    source: str = ""
    group: str = ""  # the patient where known, else the path: films of one group never part


@dataclass(frozen=True, slots=True)
class FilmFolder:
    """A folder in one of the layouts above."""

    path: Path
    films: tuple[Film, ...]

    @property
    def name(self) -> str:
        return self.path.name


def label_matches(label: str, wanted: str) -> bool:
    """Whether a folder's name means this class: case, spaces, dashes and known misspellings aside."""
    return _plain(label) == _plain(wanted)


def _plain(label: str) -> str:
    plain = "".join(c for c in label.lower() if c.isalnum())
    return _SPELLINGS.get(plain, plain)


def find_folders(data: Path, only: Sequence[str] = ()) -> list[FilmFolder]:
    """The labelled folders in `data`: itself, or its subfolders (`only` those, where any of them exists).

    Raises Fatal when nothing in it looks like labelled pictures.
    """
    if not data.is_dir():
        raise Fatal(f"The data folder {data} does not exist.")
    facts = _manifest(data)
    inside = [data / name for name in only if (data / name).is_dir()]
    if not inside and (_has_splits(data) or _pictures(data)):
        inside = [data]
    folders = [FilmFolder(path, tuple(_films(path, data, facts))) for path in inside or sorted(_subfolders(data))]
    found = [folder for folder in folders if folder.films]
    if not found:
        raise Fatal(f"{data} holds no labelled pictures; expected {data}/train/<class>/<picture> or the like.")
    return found


def _has_splits(path: Path) -> bool:
    return any((path / split).is_dir() for split in SPLITS)


def _subfolders(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _pictures(path: Path) -> bool:
    """Whether the subfolders are classes, that is: hold files themselves."""
    return any(f.is_file() for folder in _subfolders(path) for f in folder.iterdir())


def _films(path: Path, data: Path, facts: dict[str, tuple[str, str]]) -> Iterable[Film]:
    splits = [s for s in SPLITS if (path / s).is_dir()]
    for split, root in [(s, path / s) for s in splits] or [("train", path)]:
        for folder in sorted(_subfolders(root)):
            for file in sorted(folder.rglob("*")):
                if file.is_file() and file.suffix.lower() in _SUFFIXES and not file.name.startswith("."):
                    place = file.relative_to(data).as_posix()
                    source, group = facts.get(place, ("", ""))
                    yield Film(file, folder.name, split, source, group or place)


def _manifest(data: Path) -> dict[str, tuple[str, str]]:
    """path -> (source, group), from manifest.csv in `data` or above it (a task of a larger collection)."""
    for root in (data, data.parent):
        file = root / "manifest.csv"
        if not file.is_file():
            continue
        prefix = "" if root == data else data.name + "/"
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            if "path" not in (rows.fieldnames or ()):
                raise Fatal(f"{file} has no column 'path'.")
            return {
                row["path"].removeprefix(prefix): (row.get("source") or "", row.get("group") or "")
                for row in rows
                if row["path"].startswith(prefix)
            }
    return {}


def read_film(path: Path) -> NDArray[np.uint8]:
    """The whole grey picture (rows, columns) uint8, by the project's pixel policy. Raises Rejected, OSError."""
    return read_grey(path.read_bytes())[0]


def read_planes(path: Path, specs: Sequence[PlaneSpec]) -> dict[PlaneSpec, NDArray[np.uint8]]:
    """The planes that `cxrbatch scan` would give the networks, each (size, size) uint8. Raises Rejected, OSError."""
    return decode_bytes(path.read_bytes(), tuple(specs), Limits(), Identifiers(mode="drop")).planes


def shrink(grey: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    """`grey` with its longer side at most `longest` pixels, antialiased, aspect kept."""
    rows, columns = grey.shape
    if max(rows, columns) <= longest:
        return grey
    plane = fit_plane(grey, PlaneSpec(longest))
    scale = longest / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    top, left = (longest - height) // 2, (longest - width) // 2
    return plane[top : top + height, left : left + width].copy()


def read_films(
    films: Sequence[Film], longest: int
) -> tuple[list[Film], list[NDArray[np.uint8]], list[tuple[Film, str]]]:
    """All films that can be read, their pictures shrunk to `longest`, and the others with the reason."""
    read, pictures, unreadable = [], [], []
    for film in films:
        try:
            picture = shrink(read_film(film.path), longest)
        except (Rejected, OSError) as error:
            unreadable.append((film, str(error)))
        else:
            read.append(film)
            pictures.append(picture)
    return read, pictures, unreadable


def split_films(films: Sequence[Film], split: str) -> list[Film]:
    return [film for film in films if film.split == split]


def leaked_films(folders: Sequence[FilmFolder]) -> list[Film]:
    """Test films whose bytes are also a training film's. Only files of a training film's length are read."""
    films = [film for folder in folders for film in folder.films]
    tests, trained = split_films(films, "test"), split_films(films, "train")
    lengths = {film.path: film.path.stat().st_size for film in [*tests, *trained]}
    shared = {lengths[f.path] for f in tests} & {lengths[f.path] for f in trained}
    digests = {_digest(film) for film in trained if lengths[film.path] in shared}
    return [film for film in tests if lengths[film.path] in shared and _digest(film) in digests]


def _digest(film: Film) -> str:
    return hashlib.sha256(film.path.read_bytes()).hexdigest()


def grouped_split(films: Sequence[Film], share: float, seed: int) -> tuple[list[Film], list[Film]]:
    """(train, validation) with about `share` of the films in the second; a group is never parted."""
    sizes = Counter(film.group or str(film.path) for film in films)
    names = sorted(sizes)
    np.random.default_rng(seed).shuffle(names)
    chosen: set[str] = set()
    count = 0
    for name in names:
        if count >= share * len(films):
            break
        chosen.add(name)
        count += sizes[name]
    held = [film for film in films if (film.group or str(film.path)) in chosen]
    return [film for film in films if (film.group or str(film.path)) not in chosen], held


def balanced_weights(labels: Sequence[int], sources: Sequence[str], source_power: float = 0.5) -> NDArray[np.float64]:
    """Chances (n,), summing to 1: every class alike, and in a class each source by its size ** source_power."""
    sizes = Counter(zip(labels, sources, strict=True))
    shares: defaultdict[int, float] = defaultdict(float)
    for (label, _), size in sizes.items():
        shares[label] += size**source_power
    keys = list(zip(labels, sources, strict=True))
    weights = np.array([sizes[key] ** (source_power - 1) / shares[key[0]] for key in keys], np.float64)
    balanced: NDArray[np.float64] = weights / weights.sum()
    return balanced


def data_digest(films: Sequence[Film]) -> str:
    """One SHA-256 over the labels and the contents of the files, in any order of the files."""
    lines = sorted(f"{film.label} {_digest(film)}" for film in films)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
