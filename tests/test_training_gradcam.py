"""Grad-CAM: the same maps as captum's, the right corner, and a picture that opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxrbatch.engines.networks import FeatureNetwork, build_network
from cxrbatch.errors import Fatal
from cxrbatch.training.gradcam import explain, grad_cam
from making import make_bundle
from training_films import draw


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "mobilenet_v3_large"])
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


def test_explain_writes_a_picture(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    Image.fromarray(draw(0, np.random.default_rng(0))).save(tmp_path / "film.png")
    explain(tmp_path / "film.png", bundle, tmp_path / "cam.png")
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.size == (908, 482) and picture.mode == "RGB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "cam.png", "film.png"]


def test_what_is_no_film_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_text("not a film")
    with pytest.raises(Fatal, match="can't be explained"):
        explain(tmp_path / "film.png", make_bundle(tmp_path / "bundle"), tmp_path / "cam.png")
