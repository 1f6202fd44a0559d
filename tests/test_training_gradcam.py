"""Grad-CAM: the same maps as captum's, the right corner, and a valid PNG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxrbatch import unexpected
from cxrbatch.errors import Fatal, Rejected
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.cascade import Cascade
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.networks import FeatureNetwork, build_network
from cxrbatch.review.overlay_process import HeatMaps
from cxrbatch.samples import write_samples
from cxrbatch.training import gradcam
from cxrbatch.training.datasets import read_decoded
from cxrbatch.training.gradcam import explain, grad_cam
from factories import make_bundle
from training_images import draw


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "mobilenet_v2_int8", "mobilenet_v3_large"])
def test_the_maps_are_captums(architecture: str) -> None:
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    net = build_network(architecture, 1, 4).eval()
    x, targets = torch.randn(3, 1, 64, 64), torch.tensor([0, 3, 1])
    theirs = attr.LayerGradCam(lambda t: net(t)[0], net.features).attribute(x, targets, relu_attributions=True)
    torch.testing.assert_close(grad_cam(net, x, targets), theirs[:, 0], rtol=1e-4, atol=1e-9)


def test_a_network_that_looks_at_one_corner_is_caught() -> None:
    net = FeatureNetwork(torch.nn.MaxPool2d(8), torch.nn.Linear(1, 2))
    torch.nn.init.constant_(net.classifier.weight, 1.0)
    x = torch.zeros(1, 1, 32, 32)
    x[..., 24:, 24:] = 5
    cam = grad_cam(net, x, torch.tensor([0]))[0]
    assert cam.shape == (4, 4) and cam.argmax() == 15 and (cam >= 0).all()


def test_explain_writes_a_image(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    Image.fromarray(draw(0, np.random.default_rng(0))).save(tmp_path / "image.png")
    explain(tmp_path / "image.png", bundle, tmp_path / "cam.png")
    with Image.open(tmp_path / "cam.png") as array:
        assert array.size == (908, 482) and array.mode == "RGB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "cam.png", "image.png"]


def test_what_is_no_image_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("not an image")
    bundle = make_bundle(tmp_path / "bundle")
    os.mkfifo(tmp_path / "fifo")  # would wait for a writer that never comes
    for name, why in (
        ("image.png", "not_an_image: "),
        ("fifo", "not_a_regular_file: "),
        ("none", r"No such file .*y\.$"),
    ):
        with pytest.raises(Fatal, match=f"cannot be explained: {why}"):
            explain(tmp_path / name, bundle, tmp_path / "cam.png")


def test_what_the_gate_refuses_has_no_disease_that_could_be_explained(tmp_path: Path) -> None:
    Image.fromarray(draw(0, np.random.default_rng(0))).save(tmp_path / "image.png")
    no_chest = make_bundle(tmp_path / "no_chest", gate_bias=-10.0)
    lateral = make_bundle(tmp_path / "lateral", frontal_bias=-10.0)
    for bundle, label in ((no_chest, "NOT_CHEST"), (lateral, "NOT_FRONTAL")):
        with pytest.raises(Fatal, match=rf"cannot be explained: the gate refuses it \({label}, 100%\)"):
            explain(tmp_path / "image.png", bundle, tmp_path / "cam.png")
    assert not (tmp_path / "cam.png").exists()


def test_explain_says_what_a_scan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(gradcam, "_sheet", lambda _input, _cam, words: said.append(words) or Image.new("L", (8, 8)))
    bundle = load_bundle("default")  # of whole numbers, which PyTorch rounds otherwise: 71 % of this image, not 65 %
    explain(tmp_path / "chest_jpeg_baseline.dcm", bundle.path, tmp_path / "cam.png")
    decoded = read_decoded(tmp_path / "chest_jpeg_baseline.dcm", bundle.input_specs)
    (scanned,) = Cascade(bundle, open_engine("auto", "cpu", bundle)).score([decoded])
    assert not isinstance(scanned, Rejected)
    assert said[0].startswith(f"{scanned.label}  {scanned.confidence:.0%} ")


def test_explain_replaces_its_own_image_and_nothing_else(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    for name in ("image.png", "other.png"):
        Image.fromarray(draw(0, np.random.default_rng(0))).save(tmp_path / name)
    for _ in range(2):
        explain(tmp_path / "image.png", bundle, tmp_path / "cam.png")
    before = (tmp_path / "other.png").read_bytes()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to("other.png")
    for name, why in {"other": "there already", "fifo": "it is a FIFO", "link": "it is a symlink"}.items():
        with pytest.raises(Fatal, match=why):
            explain(tmp_path / "image.png", bundle, tmp_path / f"{name}.png")
    assert (tmp_path / "other.png").read_bytes() == before and (tmp_path / "link.png").is_symlink()


def test_a_bug_in_the_process_of_the_heat_maps_is_counted_by_the_review_and_a_bad_bundle_is_not() -> None:
    for bundle, words, bugs in ((["no name"], "failed", 1), ("no such bundle", "cannot be read", 0)):
        before, maps = unexpected.total(), HeatMaps(bundle)  # type: ignore[arg-type]
        try:
            with pytest.raises(Fatal, match=words):
                maps.heat_map("/in/a.dcm", "a" * 64, "b" * 64)
        finally:
            maps.close()
        assert unexpected.total() == before + bugs
