"""Cheap decode: close to the exact image in every format, as strict about damage, and another cascade in the store."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cxrbatch.errors import Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.imaging.dicom.image import read_dicom_image
from cxrbatch.imaging.formats.raster import read_jpeg
from cxrbatch.imaging.normalize import fit_model_input, shrink_factor
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.types import DecodedImage, ModelInputSpec
from factories import make_bundle
from pipelines import Pipeline

SPECS = (ModelInputSpec(40), ModelInputSpec(24, fit="stretch"))
WHO = Identifiers(mode="drop")
IMAGE = draw_chest(Chest(rows=403, columns=301))  # 301 % 4 == 1: Pillow and OpenJPEG round that differently
GRAIN = np.random.default_rng(3).normal(0, 0.004, IMAGE.shape)
IMAGE = np.clip(IMAGE + GRAIN, 0, 1)
EIGHT = np.rint(IMAGE * 255).astype(np.uint8)
TWELVE = np.rint(IMAGE * 3600 + 200).astype(np.uint16)
WINDOW = {"WindowCenter": "2000", "WindowWidth": "3000"}


def saved(kind: str, mode: str = "L", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(EIGHT).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def j2k(stored: Any, bits: int, **elements: Any) -> bytes:
    frame = imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, bitspersample=bits, codecformat="j2k")
    dataset = as_dicom(stored.view(np.uint16), ExplicitVRLittleEndian, bits=bits, **elements)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    return write_dicom(dataset)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("JPEG", quality=95, exif=exif)


FILES = {
    "jpeg": saved("JPEG", quality=95),
    "jpeg progressive": saved("JPEG", quality=95, progressive=True),
    "jpeg colour": saved("JPEG", "RGB", quality=95),
    "jpeg rotated": rotated(),
    "png": saved("PNG"),
    "png 16": bytes(imagecodecs.png_encode(EIGHT.astype(np.uint16) * 257)),
    "tiff": saved("TIFF"),
    "raw 8": write_dicom(as_dicom(EIGHT)),
    "raw window": write_dicom(as_dicom(TWELVE, bits=12, **WINDOW)),
    "raw percentiles": write_dicom(as_dicom(TWELVE, ExplicitVRBigEndian, bits=12)),
    "raw monochrome1": write_dicom(as_dicom(TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1", **WINDOW)),
    "rle": write_dicom(as_dicom(TWELVE, RLELossless, bits=12, **WINDOW)),
    "jpeg ls": write_dicom(as_dicom(TWELVE, JPEGLSLossless, bits=12, **WINDOW)),
    "jpeg lossless": write_dicom(as_dicom(TWELVE, JPEGLosslessSV1, bits=12, **WINDOW)),
    "jpeg lossless 8": write_dicom(as_dicom(EIGHT, JPEGLosslessSV1)),
    "dicom jpeg": write_dicom(as_dicom(EIGHT, JPEGBaseline8Bit)),
    "j2k 8": write_dicom(as_dicom(EIGHT, JPEG2000Lossless)),
    "j2k": j2k(TWELVE, 12, **WINDOW),
    "j2k percentiles": j2k(TWELVE, 12),
    "j2k signed": j2k(TWELVE.astype(np.int16) - 2048, 12, PixelRepresentation=1),
    "htj2k": write_dicom(as_dicom(TWELVE, HTJ2KLossless, bits=12, **WINDOW)),
}
#: The factor by which the codec itself shrinks; averaging does the rest.
BY_CODEC = {"jpeg": 4, "jpeg progressive": 4, "jpeg colour": 4, "dicom jpeg": 4}
BY_CODEC |= {"j2k": 4, "j2k 8": 4, "j2k percentiles": 4, "j2k signed": 4, "htj2k": 4}


def read(data: bytes, exact: bool) -> DecodedImage:
    return decode_bytes(data, SPECS, Limits(), WHO, exact)


@pytest.mark.parametrize("name", FILES)
def test_exact_model_inputs_are_those_of_the_whole_image(name: str) -> None:
    grey, facts = read_grey(FILES[name])
    image = read(FILES[name], exact=True)
    for spec in SPECS:
        np.testing.assert_array_equal(image.model_inputs[spec], fit_model_input(grey, spec))
    assert grey.shape in ((403, 301), (301, 403))
    assert image.facts == facts


@pytest.mark.parametrize("name", FILES)
def test_cheap_model_inputs_are_near_the_exact_ones(name: str) -> None:
    exact, cheap = (read(FILES[name], exact=way) for way in (True, False))
    most, mean = (12, 0.9) if "j2k" in name else (8, 0.4)  # at 40 pixels a side; 2 and 0.2 at 224
    for spec in SPECS:
        difference = np.abs(exact.model_inputs[spec].astype(int) - cheap.model_inputs[spec])
        assert difference.max() <= most, spec
        assert difference.mean() <= mean, spec
    for field in ("rows", "columns", "bits_stored", "grey_path", "inverted", "quality_flags"):
        assert getattr(exact.facts, field) == getattr(cheap.facts, field)


@pytest.mark.parametrize("name", FILES)
def test_what_a_codec_can_shrink_it_shrinks(name: str) -> None:
    data = FILES[name]
    if data[128:132] == b"DICM":
        assert read_dicom_image(data, Limits(), WHO, SPECS[:1]).shrunk == BY_CODEC.get(name, 1)
    elif data.startswith(b"\xff\xd8"):
        assert read_jpeg(data, Limits(), SPECS[:1]).shrunk == BY_CODEC.get(name, 1)


def test_the_factor_leaves_room_for_every_model_input() -> None:
    assert shrink_factor(2500, 2048, [ModelInputSpec(224)]) == 5
    assert shrink_factor(2500, 2048, [ModelInputSpec(128), ModelInputSpec(224)], room=3) == 3
    assert shrink_factor(2500, 2048, [ModelInputSpec(224, fit="stretch")]) == 4
    assert shrink_factor(224, 224, [ModelInputSpec(224)]) == shrink_factor(5000, 5000, []) == 1


def test_bits_above_the_stored_ones_are_never_averaged() -> None:
    overlaid = TWELVE.copy()
    overlaid[100:250:2] |= 0x8000  # an old overlay in bit 15, in the codestream as well
    data = write_dicom(as_dicom(overlaid, JPEG2000Lossless, bits=12, **WINDOW))
    exact, cheap = (read(data, exact=way).model_inputs[SPECS[0]].astype(int) for way in (True, False))
    assert np.abs(exact - cheap).max() <= 8


def test_flags_are_about_the_whole_image() -> None:
    band = np.ascontiguousarray(np.tile(EIGHT[150:300], (1, 3)))  # 150 x 903: shrunk, it is under 128 pixels high
    for data in (write_dicom(as_dicom(band)), write_dicom(as_dicom(band, JPEGBaseline8Bit))):
        exact, cheap = (read(data, exact=way).facts.quality_flags for way in (True, False))
        assert exact == cheap
        assert "tiny" not in cheap and "extreme_aspect" in cheap


def test_damage_that_shows_in_the_image_is_seen_as_often_as_before() -> None:
    """Flipped bits are detected where the format allows it; undetected ones change the cheap image no more."""
    chance = random.Random(7)
    for name in ("jpeg", "dicom jpeg", "htj2k", "j2k", "png", "jpeg ls"):
        unseen = {True: 0, False: 0}
        whole = {way: read(FILES[name], way).model_inputs[SPECS[0]].astype(int) for way in unseen}
        for _ in range(20):
            damaged = bytearray(FILES[name])
            damaged[chance.randrange(len(damaged) // 2, len(damaged) - 20)] ^= 1 << chance.randrange(8)
            for way in unseen:
                try:
                    model_input = read(bytes(damaged), way).model_inputs[SPECS[0]].astype(int)
                except Rejected:
                    continue
                unseen[way] += bool(np.abs(model_input - whole[way]).max() > 4)
        assert unseen[False] <= unseen[True] + 1, name


KINDS = ("jpeg", "jpeg colour", "png", "tiff", "raw window", "rle", "j2k", "htj2k", "dicom jpeg")


def test_exact_is_honoured_from_the_command_line_to_the_row(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    pipeline = Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", bundle)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in KINDS:
        (folder / name.replace(" ", "_")).write_bytes(FILES[name])

    def rows(*args: object, **env: str) -> dict[str, dict[str, str]]:
        run = pipeline.run("scan", folder, "--csv", "out.csv", *args, **env)
        assert run.code == 0, run.err
        with (tmp_path / "out.csv").open(newline="") as file:
            return {Path(row["path"]).name: row for row in csv.DictReader(file)}

    cheap, exact = rows(), rows("--exact")
    assert {row["cascade"] for row in cheap.values()} == {"test 0"}
    assert {row["cascade"] for row in exact.values()} == {"test 0 exact"}
    differ = {name for name in cheap if cheap[name]["confidence"] != exact[name]["confidence"]}
    assert differ == set(cheap), "each kind was read in another way"
    kept = "SELECT m.version, count(*) FROM predictions p JOIN models m ON m.id = p.cascade_id GROUP BY 1 ORDER BY 1"
    assert pipeline.ask(kept) == [("0", len(KINDS)), ("0 exact", len(KINDS))]

    def said(rows: dict[str, dict[str, str]]) -> dict[str, list[str]]:
        return {name: [row[column] for column in ("cascade", "label", "confidence")] for name, row in rows.items()}

    assert said(rows(CXRBATCH_EXACT="true")) == said(exact)
    assert said(rows()) == said(cheap)
    assert pipeline.ask(kept) == [("0", len(KINDS)), ("0 exact", len(KINDS))]
