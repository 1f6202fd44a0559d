"""Grad-CAM (Selvaraju et al. 2017) of the last feature map: which parts of an image raised the score.

The map is coarse (7 x 7 cells at 224 pixels), and it does not show disease.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional

from cxrbatch.errors import Fatal, Rejected
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.cascade import Cascade
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.networks import FeatureNetwork, build_network, load_state, read_state
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.output_file import check_target, new_file
from cxrbatch.training.datasets import read_decoded

__all__ = ["explain", "grad_cam", "load_network", "network_input"]

_SHOWN = 448  # pixels a side of each of the two images
_MADE_BY = "cxrbatch explain"  # stands in the PNG, and tells it from an image


def load_network(stage: ModelSpec) -> FeatureNetwork:
    """The stage's network in float32, in evaluation mode."""
    net = build_network(stage.architecture, stage.channels, len(stage.classes))
    load_state(net, read_state(stage.weights))
    return net.eval()


def network_input(model_inputs: NDArray[np.uint8], stage: ModelSpec) -> Tensor:
    """Model inputs (n, size, size) uint8 -> what the stage's network takes, (n, channels, size, size) float32."""
    x = torch.from_numpy(np.array(model_inputs))[:, None].float() / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (stage.mean, stage.std))
    return (x - mean) / std


def grad_cam(net: FeatureNetwork, x: Tensor, targets: Tensor) -> Tensor:
    """Maps (n, h, w), values >= 0, of what raised the logit of each image's target class.

    x (n, channels, s, s), targets (n,) class numbers; h and w are the size of the last feature map.
    """
    with torch.enable_grad():
        maps: Tensor = net.features(x).detach().requires_grad_()
        logits = net.classifier(maps.mean((2, 3)))
        chosen = logits[torch.arange(len(x)), targets].sum()
        (gradient,) = torch.autograd.grad(chosen, maps)
    return functional.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1)).detach()


def explain(file: Path, bundle: Path, out: Path) -> None:
    """Write a PNG: the image as the disease network gets it, and the same under its Grad-CAM.

    Raises Fatal when the image or the bundle cannot be used, the gate refuses the image, or `out` is something else
    than an earlier such PNG.
    """
    check_target(out, _earlier)
    loaded = load_bundle(bundle)
    stage = loaded.disease
    try:
        decoded = read_decoded(file, loaded.input_specs)
        # As a scan: engines round networks of whole numbers otherwise, by several points of a confidence.
        (found,) = Cascade(loaded, open_engine("auto", "cpu", loaded)).score([decoded])
        if isinstance(found, Rejected):
            raise found
    except Rejected as rejected:
        raise Fatal(f"{file} cannot be explained: {rejected}") from None
    except OSError as error:
        raise Fatal(f"{file} cannot be explained: {error.strerror}.") from None
    if found.label not in stage.classes:
        raise Fatal(
            f"{file} cannot be explained: the gate refuses it ({found.label}, {found.confidence:.0%}), and what it "
            "refuses the disease model does not score. A scan gives it the same label; look at the image itself."
        )
    model_input = decoded.model_inputs[stage.model_input]
    target = torch.tensor([stage.classes.index(found.label)])
    cam = grad_cam(load_network(stage), network_input(model_input[None], stage), target)[0]
    words = f"{found.label}  {found.confidence:.0%}   |   what moved the score, not where disease is"
    array = _sheet(model_input, cam, words)
    made_by = PngInfo()
    made_by.add_text("Software", _MADE_BY)
    with new_file(out, _earlier) as png:
        array.save(png, "PNG", pnginfo=made_by)


def _earlier(first: bytes, last: bytes) -> bool:
    return first.startswith(b"\x89PNG") and b"tEXtSoftware\0" + _MADE_BY.encode() in first


def _sheet(model_input: NDArray[np.uint8], cam: Tensor, words: str) -> Image.Image:
    from matplotlib import colormaps  # here: the heat maps of the review do without it

    image = np.asarray(Image.fromarray(model_input).resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC), np.float32)
    heat = functional.interpolate(cam[None, None], (_SHOWN, _SHOWN), mode="bicubic")[0, 0].clamp(min=0).numpy()
    heat = heat / max(float(heat.max()), 1e-12)
    colours = colormaps["inferno"](heat)[..., :3] * 255
    share = 0.6 * heat[..., None] ** 0.7
    overlay = image[..., None] * (1 - share) + colours * share
    sheet = Image.new("RGB", (2 * _SHOWN + 12, _SHOWN + 34), "white")
    sheet.paste(Image.fromarray(image.astype(np.uint8)), (0, 34))
    sheet.paste(Image.fromarray(np.clip(overlay, 0, 255).astype(np.uint8)), (_SHOWN + 12, 34))
    ImageDraw.Draw(sheet).text((6, 8), words, fill="#22303c", font=ImageFont.load_default(16))
    return sheet
