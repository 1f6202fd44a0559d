"""Real images: one in 14 transfer syntaxes, and three broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes, read_grey
from cxrbatch.types import ModelInputSpec

FOLDER = Path(__file__).parent.parent.parent / "shared" / "dicom"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared is not there"),
]
LOSSY = {"nih8_j2k_lossy": 12, "nih8_jls_near": 4, "nih8_jpeg_baseline": 24, "nih8_jpeg_ext": 24}
BROKEN = {
    "corrupt_j2k_966.dcm": ReasonCode.CORRUPT_PIXELS,
    "html_named.dcm": ReasonCode.NOT_AN_IMAGE,
    "no_pixel_data.dcm": ReasonCode.STRUCTURED_REPORT,
}


def test_one_image_in_14_transfer_syntaxes() -> None:
    spec = ModelInputSpec(224)
    reference = decode_bytes(
        (FOLDER / "chest/nih8_evle.dcm").read_bytes(), (spec,), Limits(), Identifiers(), exact=True
    )
    paths = sorted(FOLDER.glob("chest/nih8_*.dcm"))
    assert len(paths) == 14
    for path in paths:
        image = decode_bytes(path.read_bytes(), (spec,), Limits(), Identifiers(), exact=True)
        difference = np.abs(image.model_inputs[spec].astype(int) - reference.model_inputs[spec])
        assert difference.max() <= LOSSY.get(path.stem, 0), path.name
        assert image.facts.quality_flags == (), path.name


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_reasons(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_grey((FOLDER / "broken" / name).read_bytes())
    assert caught.value.reason_code == BROKEN[name]


def test_every_other_image_is_read() -> None:
    for path in sorted([*FOLDER.glob("chest/*"), *FOLDER.glob("not_chest/*"), *FOLDER.glob("lut/*")]):
        grey, facts = read_grey(path.read_bytes())
        assert grey.std() > 10, path.name
        assert "near_constant" not in facts.quality_flags, path.name
