"""The images that everybody in the bench reads: phantoms in six kinds, and real ones where ../shared has them.

A kind has a few distinct images. Each file carries a number in its header, so that no two files have the same
bytes (the same content would be scored once), while decoding costs what it costs.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1

from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest

__all__ = ["KINDS", "Kind", "image_paths", "make_kind"]

_PICTURES = 3  # distinct ones a kind
_SHARED = Path("../shared/data")


@dataclass(frozen=True)
class Kind:
    """One kind of input: `files` for the scan and the floor, of which the slow loops get the first `loop_files`."""

    name: str
    title: str
    suffix: str
    files: int
    loop_files: int


KINDS = (
    Kind("jpeg1024", "JPEG 1024 px", ".jpg", 1_000, 30),
    Kind("jpeg2000", "JPEG 2000 px", ".jpg", 800, 24),
    Kind("png1024", "PNG 1024 px", ".png", 600, 30),
    Kind("raw", "DICOM raw, 2048 x 2500, 16 bit", ".dcm", 240, 12),
    Kind("jpegll", "DICOM JPEG lossless, the same", ".dcm", 160, 8),
    Kind("j2k", "DICOM JPEG 2000 lossless, the same", ".dcm", 240, 6),
    Kind("real", "images of ../shared/data", "", 1_500, 30),
)


def make_kind(kind: Kind, folder: Path, files: int) -> Path | None:
    """A folder with at least `files` images of that kind, made where they are missing; None where there are none."""
    place = folder / kind.name
    place.mkdir(parents=True, exist_ok=True)
    there = len(os.listdir(place))
    if kind.name == "real":
        return _real(place, files, there)
    if there < files:
        number = _NUMBERED[kind.suffix]
        images = _encoded(kind)
        for i in range(there, files):
            path = place / f"{i:05}{kind.suffix}"
            path.write_bytes(number(images[i % _PICTURES], i))
            os.utime(path, (1.6e9, 1.6e9))  # long since whole
    return place


def _real(place: Path, files: int, there: int) -> Path | None:
    if not (_SHARED / "manifest.csv").is_file():
        return None
    if there < files:
        with (_SHARED / "manifest.csv").open(newline="") as manifest:
            paths = [row["path"] for row in csv.DictReader(manifest)]
        images = sorted(p for p in paths if p.startswith("cascade/test/"))
        for i in range(there, files):
            source = _SHARED / images[i * len(images) // files]
            shutil.copyfile(source, place / f"{i:05}{source.suffix}")
            os.utime(place / f"{i:05}{source.suffix}", (1.6e9, 1.6e9))
    return place


def _encoded(kind: Kind) -> list[bytes]:
    sides = {"jpeg1024": (1024, 1024), "jpeg2000": (2000, 2000), "png1024": (1024, 1024)}
    rows, columns = sides.get(kind.name, (2500, 2048))
    return [bytes(_ENCODERS[kind.name](_drawn(seed, rows, columns))) for seed in range(_PICTURES)]


@cache  # drawing a large one takes seconds, and three kinds share them
def _drawn(seed: int, rows: int, columns: int) -> NDArray[np.float64]:
    return draw_chest(Chest(seed, rows=rows, columns=columns))


def _as(format_: str, **options: Any) -> Callable[[NDArray[np.float64]], bytes]:
    def encode(image: NDArray[np.float64]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(np.rint(image * 255), np.uint8)).save(buffer, format_, **options)
        return buffer.getvalue()

    return encode


def _dicom(syntax: UID) -> Callable[[NDArray[np.float64]], bytes]:
    def encode(image: NDArray[np.float64]) -> bytes:
        stored = np.asarray(np.rint(image * 12_000) + 1_500, np.uint16)
        return write_dicom(as_dicom(stored, syntax, bits=14, WindowCenter="7000", WindowWidth="11000"))

    return encode


_ENCODERS: dict[str, Callable[[NDArray[np.float64]], bytes]] = {
    "jpeg1024": _as("JPEG", quality=90),
    "jpeg2000": _as("JPEG", quality=90),
    "png1024": _as("PNG"),
    "raw": _dicom(ExplicitVRLittleEndian),
    "jpegll": _dicom(JPEGLosslessSV1),
    "j2k": _dicom(JPEG2000Lossless),
}


def _numbered_jpeg(jpeg: bytes, number: int) -> bytes:
    comment = f"image {number:06}".encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]


def _numbered_png(png: bytes, number: int) -> bytes:
    chunk = b"tEXt" + f"Comment\0image {number:06}".encode()
    at = 8 + 25  # signature and IHDR
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:at] + framed + png[at:]


def _numbered_dicom(dicom: bytes, number: int) -> bytes:
    return dicom.replace(b"SYNTH-A001", f"S-A{number:07}".encode(), 1)  # the accession number; same length


_NUMBERED = {".jpg": _numbered_jpeg, ".png": _numbered_png, ".dcm": _numbered_dicom}


def image_paths(folder: Path, files: int) -> Iterator[str]:
    """The first `files` images of a folder, in order."""
    yield from (str(folder / name) for name in sorted(os.listdir(folder))[:files])
