"""The samples are what their names say, and the same on every run."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pydicom
import pytest

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Limits, read_grey
from cxrbatch.samples import write_samples
from cxrbatch.samples.files import _broken, _images, _no_images

REASONS = {
    "broken_constant.png": ReasonCode.CONSTANT_IMAGE,
    "broken_damaged_pixels.dcm": ReasonCode.CORRUPT_PIXELS,
    "broken_empty.dcm": ReasonCode.EMPTY_FILE,
    "broken_no_pixel_data.dcm": ReasonCode.NO_PIXEL_DATA,
    "broken_text.dcm": ReasonCode.NOT_AN_IMAGE,
    "broken_truncated.dcm": ReasonCode.TRUNCATED,
    "broken_web_page.dcm": ReasonCode.NOT_AN_IMAGE,
    "broken_wrong_size.dcm": ReasonCode.CORRUPT_PIXELS,
    "broken_zip_archive.png": ReasonCode.NOT_AN_IMAGE,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.name: path for path in write_samples(tmp_path_factory.mktemp("samples") / "new")}


def test_every_image_is_read_and_every_broken_file_has_its_reason(samples: dict[str, Path]) -> None:
    assert len(samples) == 27
    for name, path in samples.items():
        if name.startswith("broken"):
            with pytest.raises(Rejected) as caught:
                read_grey(path.read_bytes())
            assert caught.value.reason_code == REASONS.pop(name), name
        else:
            grey, facts = read_grey(path.read_bytes(), Limits())
            harmless = {"colour", "polarity_suspect"} if name.startswith("not_a_chest") else set()
            assert set(facts.quality_flags) <= harmless, name
            assert grey.std() > 20, name
    assert not REASONS


def test_the_copy_and_the_negative_show_the_same_image(samples: dict[str, Path]) -> None:
    image = samples["chest_12_bit_with_window.dcm"].read_bytes()
    assert samples["chest_12_bit_with_window_copy.dcm"].read_bytes() == image
    negative, facts = read_grey(samples["chest_12_bit_monochrome1_twin.dcm"].read_bytes())
    assert facts.inverted
    np.testing.assert_array_equal(negative, read_grey(image)[0])


def test_every_dicom_sample_says_that_it_is_synthetic(samples: dict[str, Path]) -> None:
    images = [path for name, path in samples.items() if name.endswith(".dcm") and not name.startswith("broken")]
    assert len(images) == 11
    for path in images:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert str(dataset.PatientID).startswith("SYNTH-")
        assert "ynthetic" in dataset.ImageComments


def test_samples_are_the_same_on_every_run(samples: dict[str, Path]) -> None:
    for name, content in (*islice(_images(0), 5), *_no_images(0), *_broken(0)):
        assert samples[name].read_bytes() == content, name
