"""The sample folder: about two dozen files whose names say what they are and which result to expect."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cxrbatch.output_file import new_file, starts_with
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, colour_pattern, draw_chest, draw_hand, draw_text_page

__all__ = ["write_samples"]


def write_samples(directory: Path, seed: int = 0) -> list[Path]:
    """Write the samples into `directory` (created if missing) and return their paths, sorted.

    Deterministic: the same seed and library versions give the same bytes. Raises OSError, and Fatal if another file
    has the name of a sample.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in (*_images(seed), *_no_images(seed), *_broken(seed)):
        path = directory / name
        with new_file(path, starts_with(*filter(None, [content[:512]]))) as file:
            file.write(content)
        paths.append(path)
    return sorted(paths)


def _images(seed: int) -> Iterator[tuple[str, bytes]]:
    first = draw_chest(Chest(seed))
    twelve = _levels(first, 3600, 200)
    explicit = write_dicom(as_dicom(twelve, bits=12, patient=1, WindowCenter="2000", WindowWidth="3600"))
    yield "chest_12_bit_with_window.dcm", explicit
    yield "chest_12_bit_with_window_copy.dcm", explicit
    twin = as_dicom(
        4095 - twelve,
        bits=12,
        patient=1,
        PhotometricInterpretation="MONOCHROME1",
        WindowCenter="2096",
        WindowWidth="3600",
    )
    yield "chest_12_bit_monochrome1_twin.dcm", write_dicom(twin)
    raw = as_dicom(_levels(draw_chest(Chest(seed + 1, heart=1.25)), 11000, 900), bits=14, patient=2)
    yield "chest_14_bit_without_window.dcm", write_dicom(raw)

    variants = (
        ("implicit_vr", ImplicitVRLittleEndian, Chest(seed + 2, finding="opacity")),
        ("rle", RLELossless, Chest(seed + 3, lung=0.94)),
        ("jpeg_baseline", JPEGBaseline8Bit, Chest(seed + 4, finding="effusion")),
        ("jpeg_lossless", JPEGLosslessSV1, Chest(seed + 5, heart=0.9)),
        ("jpeg_ls", JPEGLSLossless, Chest(seed + 6, finding="nodule")),
        ("jpeg_2000", JPEG2000Lossless, Chest(seed + 7, rows=640, columns=560)),
    )
    for patient, (name, syntax, chest) in enumerate(variants, start=3):
        yield f"chest_{name}.dcm", write_dicom(as_dicom(_levels(draw_chest(chest)), syntax, patient=patient))
    bare = write_dicom(as_dicom(_levels(draw_chest(Chest(seed + 8, lung=1.05))), patient=9))
    yield "chest_without_preamble", bare[132:]
    yield "chest_8_bit.png", _pillow(_levels(draw_chest(Chest(seed + 9))), "PNG")
    yield "chest_16_bit.png", bytes(imagecodecs.png_encode(_levels(draw_chest(Chest(seed + 10)), 65535)))
    yield "chest_grey.jpg", _pillow(_levels(draw_chest(Chest(seed + 11, finding="opacity"))), "JPEG")
    yield "chest_16_bit.tif", _pillow(_levels(draw_chest(Chest(seed + 12)), 65535), "TIFF")


def _no_images(seed: int) -> Iterator[tuple[str, bytes]]:
    hand = as_dicom(_levels(draw_hand(seed)), patient=20, BodyPartExamined="HAND")
    yield "not_a_chest_hand.dcm", write_dicom(hand)
    yield "not_a_chest_text_page.png", _pillow(_levels(draw_text_page()), "PNG")
    yield "not_a_chest_landscape.jpg", _pillow(colour_pattern(seed), "JPEG")


def _broken(seed: int) -> Iterator[tuple[str, bytes]]:
    image = _levels(draw_chest(Chest(seed + 13, rows=320, columns=288)))
    whole = write_dicom(as_dicom(image, patient=30))
    yield "broken_empty.dcm", b""
    yield "broken_truncated.dcm", whole[: len(whole) * 2 // 3]
    yield "broken_text.dcm", b"These are words. Somebody gave them the name of an image.\n" * 20
    yield "broken_web_page.dcm", b"<!DOCTYPE html>\n<html><body><h1>502 Bad Gateway</h1></body></html>\n"
    yield "broken_zip_archive.png", _zip(whole)
    report = as_dicom(image, patient=31)
    del report.PixelData, report.Rows, report.Columns
    yield "broken_no_pixel_data.dcm", write_dicom(report)
    yield "broken_constant.png", _pillow(np.full((256, 256), 128, np.uint8), "PNG")
    damaged = bytearray(write_dicom(as_dicom(image, JPEGLSLossless, patient=32)))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 64] = bytes(range(64))
    yield "broken_damaged_pixels.dcm", bytes(damaged)
    lying = as_dicom(image, JPEGBaseline8Bit, patient=33)
    lying.Rows, lying.Columns = lying.Rows * 2, lying.Columns * 2
    yield "broken_wrong_size.dcm", write_dicom(lying)


def _levels(image: NDArray[np.float64], top: int = 255, bottom: int = 0) -> NDArray[Any]:
    """Scale 0..1 to `bottom`..`bottom + top`: uint8 up to 255, uint16 above."""
    return np.asarray(np.rint(image * top) + bottom, np.uint8 if top <= 255 else np.uint16)


def _pillow(samples: NDArray[Any], format_: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, format_)
    return buffer.getvalue()


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("image.dcm", (2020, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()
