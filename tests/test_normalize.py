"""The pixel policy: each path to grey compared with pydicom's own processing; twins, fallbacks and flags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.imaging.greyscale import GreyScale, Window
from cxrbatch.imaging.normalize import fit_model_input, render
from cxrbatch.imaging.polarity import looks_negative
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.types import ModelInputSpec

IMAGE = draw_chest(Chest(rows=160, columns=144))
EIGHT = np.rint(IMAGE * 255).astype(np.uint8)
TWELVE = np.rint(IMAGE * 3600 + 200).astype(np.uint16)


def lut_item(first: int, entries: Any, bits: int, **more: Any) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.add_new(0x00283006, "US", [int(entry) for entry in entries])
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


CURVE = np.rint(4095 * np.linspace(0, 1, 4096) ** 1.6)
WAYS: dict[str, dict[str, Any]] = {
    "window linear": {"WindowCenter": "1800", "WindowWidth": "2500"},
    "window of width 1": {"WindowCenter": "1800", "WindowWidth": "1"},
    "first of several windows": {"WindowCenter": ["1800", "40"], "WindowWidth": ["2500", "80"]},
    "window linear_exact": {"WindowCenter": "1800", "WindowWidth": "2500.5", "VOILUTFunction": "LINEAR_EXACT"},
    "window sigmoid": {"WindowCenter": "1800", "WindowWidth": "1400", "VOILUTFunction": "SIGMOID"},
    "rescale; window linear": {
        "RescaleSlope": "0.5",
        "RescaleIntercept": "-200",
        "WindowCenter": "800",
        "WindowWidth": "1500",
    },
    "voi_lut_sequence": {"VOILUTSequence": [lut_item(0, CURVE, 12)]},
    "voi_lut_sequence before window": {
        "VOILUTSequence": [lut_item(300, CURVE[:3000], 12)],
        "WindowCenter": "1",
        "WindowWidth": "2",
    },
    "modality_lut_sequence; window linear": {
        "ModalityLUTSequence": [lut_item(0, CURVE[::-1] * 16, 16, ModalityLUTType="US")],
        "WindowCenter": "32000",
        "WindowWidth": "48000",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_each_voi_path_agrees_with_pydicom(way: str) -> None:
    dataset = as_dicom(TWELVE, bits=12, **WAYS[way])
    grey, facts = read_grey(write_dicom(dataset))
    reference = apply_voi_lut(apply_modality_lut(TWELVE, dataset), dataset).astype(np.float64)
    low, high = 0.0, 65535.0 if "ModalityLUTSequence" in dataset else 4095.0
    if "RescaleSlope" in dataset:
        low, high = (v * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept) for v in (low, high))
    reference = (reference - low) / (high - low) * 255
    assert np.abs(grey - reference).max() <= 0.5 + 1e-6
    assert facts.grey_path == way.replace(" before window", "").replace(
        "first of several windows", "window linear"
    ).replace("window of width 1", "window linear")
    flags = {"saturated"} if "width 1" in way else {"polarity_suspect"} if "modality" in way else set()
    assert set(facts.quality_flags) == flags  # the modality LUT here turns the image negative


@pytest.mark.parametrize("as_file", ["8 bit, stretched", "12 bit with a window", "large, shrunk while decoding"])
def test_the_mean_grey_is_that_of_the_model_input_without_its_padding(as_file: str) -> None:
    spec = ModelInputSpec(64, "stretch")  # no padding
    if as_file.startswith("12"):
        data = write_dicom(as_dicom(TWELVE, bits=12, WindowCenter="1800", WindowWidth="2500"))
    else:
        samples = EIGHT if as_file.startswith("8") else np.kron(EIGHT, np.ones((8, 8), np.uint8))
        data = write_dicom(as_dicom(samples, bits=8))
    decoded = decode_bytes(data, (spec, ModelInputSpec(64, "pad")), Limits(), Identifiers(mode="drop"))
    assert decoded.facts.grey_mean == pytest.approx(decoded.model_inputs[spec].mean(), abs=0.6)
    exact = decode_bytes(data, (spec,), Limits(), Identifiers(mode="drop"), exact=True)
    assert decoded.facts.grey_mean == pytest.approx(exact.facts.grey_mean, abs=0.6)


def test_8_bit_images_come_through_unchanged() -> None:
    grey, facts = read_grey(write_dicom(as_dicom(EIGHT)))
    np.testing.assert_array_equal(grey, EIGHT)
    assert (facts.grey_path, facts.inverted) == ("as_stored", False)


def test_more_bits_without_voi_are_windowed_between_percentiles() -> None:
    grey, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12)))
    low, high = np.percentile(TWELVE, [0.5, 99.5])
    np.testing.assert_allclose(grey, np.clip((TWELVE - low) / (high - low), 0, 1) * 255, atol=0.5 + 1e-6)
    assert facts.grey_path == "percentile 0.5-99.5"


def test_sixteen_bits_that_a_window_leaves_as_they_are_come_out_as_eight() -> None:
    samples = EIGHT.astype(np.uint16)
    samples[0, 0] = 255
    grey = render(samples, GreyScale(16, window=Window(128, 256))).grey
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey, samples)


def test_padding_is_left_out_of_the_percentiles() -> None:
    padded = TWELVE.copy()
    padded[:40] = 0
    grey, _ = read_grey(write_dicom(as_dicom(padded, bits=12, PixelPaddingValue=0)))
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE[40:].copy(), bits=12)))
    np.testing.assert_array_equal(grey[40:], expected)
    ranged, _ = read_grey(write_dicom(as_dicom(padded, bits=12, PixelPaddingValue=0, PixelPaddingRangeLimit=3)))
    np.testing.assert_array_equal(ranged, grey)


@pytest.mark.parametrize("marks", ["monochrome1", "inverse", "both"])
@pytest.mark.parametrize("way", ["none", "window", "sigmoid", "8 bit"])
def test_a_genuine_negative_gives_the_same_image(marks: str, way: str) -> None:
    rng = np.random.default_rng(1)
    stored = EIGHT if way == "8 bit" else (TWELVE + rng.integers(0, 9, TWELVE.shape)).astype(np.uint16)
    bits, top = (8, 255) if way == "8 bit" else (12, 4095)
    there: dict[str, Any] = {}
    mirrored: dict[str, Any] = {}
    if way == "window":  # LINEAR is centred half a value low (C.11.2.1.2), so the mirror image moves by one
        there, mirrored = (
            {"WindowCenter": "1800", "WindowWidth": "2551"},
            {"WindowCenter": "2296", "WindowWidth": "2551"},
        )
    if way == "sigmoid":
        there = {"WindowCenter": "1800", "WindowWidth": "900", "VOILUTFunction": "SIGMOID"}
        mirrored = there | {"WindowCenter": "2295"}
    if marks != "inverse":
        mirrored["PhotometricInterpretation"] = "MONOCHROME1"
    if marks != "monochrome1":
        mirrored["PresentationLUTShape"] = "INVERSE"
    grey, _ = read_grey(write_dicom(as_dicom(stored, bits=bits, **there)))
    twin, facts = read_grey(write_dicom(as_dicom((top - stored).astype(stored.dtype), bits=bits, **mirrored)))
    assert facts.inverted
    np.testing.assert_array_equal(twin, grey)


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": "40000", "WindowWidth": "100"},
        {"WindowCenter": "-500", "WindowWidth": "100"},
        {"WindowCenter": "1800", "WindowWidth": "0"},
        {"WindowCenter": "1800", "WindowWidth": "-20"},
        {"WindowCenter": "1800", "WindowWidth": "9000000"},
        {"VOILUTSequence": [lut_item(0, [9] * 16, 12)]},
    ],
)
def test_a_window_that_shows_nothing_is_passed_over(window: dict[str, Any]) -> None:
    grey, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, **window)))
    np.testing.assert_array_equal(grey, read_grey(write_dicom(as_dicom(TWELVE, bits=12)))[0])
    assert facts.quality_flags == ("window_unusable",)


def test_windows_of_enhanced_objects_are_found() -> None:
    frame, voi = Dataset(), Dataset()
    voi.WindowCenter, voi.WindowWidth = "1800", "2500"
    frame.FrameVOILUTSequence = [voi]
    grey, facts = read_grey(write_dicom(as_dicom(TWELVE, bits=12, SharedFunctionalGroupsSequence=[frame])))
    expected, _ = read_grey(write_dicom(as_dicom(TWELVE, bits=12, WindowCenter="1800", WindowWidth="2500")))
    np.testing.assert_array_equal(grey, expected)
    assert facts.grey_path == "window linear"


def test_16_bit_images_that_fill_their_range_are_scaled_whole() -> None:
    full = np.rint(IMAGE * 65535).astype(np.uint16)
    rendered = render(full, GreyScale(16, may_fill_range=True))
    assert rendered.grey_path == "whole_range"
    np.testing.assert_allclose(rendered.grey, full / 257, atol=0.5 + 1e-6)
    dim = render(TWELVE, GreyScale(16, may_fill_range=True))
    assert dim.grey_path == "percentile 0.5-99.5"


def test_constant_images_are_refused_and_poor_ones_flagged() -> None:
    scale = GreyScale(8)
    with pytest.raises(Rejected) as caught:
        render(np.full((200, 200), 9, np.uint8), scale)
    assert caught.value.reason_code == ReasonCode.CONSTANT_IMAGE
    speck = np.full((200, 200), 9, np.uint8)
    speck[0, 0] = 200
    assert render(speck, scale).quality_flags == ("near_constant",)
    burnt = np.where(EIGHT > 60, 255, EIGHT).astype(np.uint8)
    assert "saturated" in render(burnt, scale).quality_flags
    assert "tiny" in render(EIGHT[:64], scale).quality_flags
    assert "extreme_aspect" in render(EIGHT[:40], scale).quality_flags
    assert render(EIGHT, scale).quality_flags == ()


def test_non_finite_floats() -> None:
    values = TWELVE.astype(np.float32)
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    assert render(values, GreyScale(32)).grey.shape == TWELVE.shape
    with pytest.raises(Rejected) as caught:
        render(np.full((64, 64), np.nan, np.float32), GreyScale(32))
    assert caught.value.reason_code == ReasonCode.CORRUPT_PIXELS


def test_every_integer_and_float_container_gives_the_same_grey() -> None:
    scale = GreyScale(12, window=Window(1800, 2500))
    expected = render(TWELVE, scale).grey
    for kind in ("int16", ">u2", ">i2", "int32", "uint32", "float32", "float64"):
        np.testing.assert_array_equal(render(TWELVE.astype(kind), scale).grey, expected)


def test_fit_model_input_pads_with_black_and_keeps_the_shape() -> None:
    tall = np.full((200, 100), 255, np.uint8)
    model_input = fit_model_input(tall, ModelInputSpec(64))
    assert model_input.shape == (64, 64)
    assert (model_input[:, :16].max(), model_input[:, 48:].max(), model_input[:, 16:48].min()) == (0, 0, 255)
    assert fit_model_input(tall, ModelInputSpec(64, fit="stretch")).min() == 255


def test_a_image_shown_negative_is_suspected() -> None:
    for seed in range(3):
        image = np.rint(draw_chest(Chest(seed, rows=200, columns=180)) * 255).astype(np.uint8)
        assert not looks_negative(image)
        assert looks_negative(255 - image)
    wrongly_tagged = write_dicom(as_dicom(EIGHT, PhotometricInterpretation="MONOCHROME1"))
    assert read_grey(wrongly_tagged)[1].quality_flags == ("polarity_suspect",)
