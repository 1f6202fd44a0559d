"""Checks for the card: does the network use the lungs, or the source of the image?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.datasets import LabelledImage, read_image
from cxrbatch.training.gradcam import grad_cam, load_network, network_input
from cxrbatch.training.metrics import bootstrap

__all__ = ["cam_outside", "source_probe"]

_CENTRAL = 0.8  # share of a side that counts as the chest, in the middle


def cam_outside(stage: ModelSpec, images: Sequence[LabelledImage]) -> tuple[float, list[float]]:
    """Mean share of Grad-CAM mass outside the central chest, for the predicted class, and its 95 % interval.

    The central chest is the middle 80 % of each side of the image itself (without black padding); a uniform map has
    36 % of its mass outside.
    """
    net = load_network(stage)
    shares, groups = [], []
    for image in images:
        array = read_image(image.path)
        x = network_input(fit_model_input(array, stage.model_input)[None], stage)
        with torch.no_grad():
            called = net(x)[0].argmax(1)
        size = stage.model_input.size
        cam = functional.interpolate(grad_cam(net, x, called)[None], (size, size), mode="bilinear")[0, 0].numpy()
        inside = _central(array.shape[0], array.shape[1], stage)
        if cam.sum() > 0:
            shares.append(float(cam[~inside].sum() / cam.sum()))
            groups.append(image.group)
    each = np.array(shares)
    return float(each.mean()), bootstrap(groups, lambda rows: {"mean": float(each[rows].mean())})["mean"]


def _central(rows: int, columns: int, stage: ModelSpec) -> NDArray[np.bool_]:
    size = stage.model_input.size
    scale = size / max(rows, columns)
    height, width = (size, size) if stage.model_input.fit == "stretch" else (rows * scale, columns * scale)
    y, x = np.mgrid[0:size, 0:size] + 0.5 - size / 2
    central: NDArray[np.bool_] = (np.abs(y) <= _CENTRAL * height / 2) & (np.abs(x) <= _CENTRAL * width / 2)
    return central


def source_probe(features: NDArray[np.float32], images: Sequence[LabelledImage], seed: int = 0) -> dict[str, Any]:
    """How well a linear probe predicts the source of an image from its features, within one class.

    Within a class, disease carries no information about the source, so the probe can only use the style of a hospital.
    Only labels with several sources count; half of the images train the probe and half test it. `chance` is 1 / number
    of sources.
    """
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    found = {}
    for label in sorted({f.label for f in images}):
        rows = np.array([i for i, f in enumerate(images) if f.label == label])
        sources = np.array([images[i].source for i in rows])
        counts = Counter(sources.tolist())
        keep = np.array([counts[s] >= 10 for s in sources])
        rows, sources = rows[keep], sources[keep]
        if len(set(sources.tolist())) < 2:
            continue
        order = rng.permutation(len(rows))
        half = len(order) // 2
        x = features[rows] - features[rows].mean(0)
        x = x / (x.std() + 1e-6)
        probe = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced").fit(
            x[order[:half]], sources[order[:half]]
        )
        guess = probe.predict(x[order[half:]])
        truth = sources[order[half:]]

        def balanced(drawn: NDArray[np.int64], truth: Any = truth, guess: Any = guess) -> dict[str, float]:
            there = set(truth[drawn].tolist())
            return {"balanced": float(np.mean([(guess[drawn] == s)[truth[drawn] == s].mean() for s in there]))}

        everything = np.arange(len(truth))
        groups = [images[i].group for i in rows[order[half:]]]
        found[label] = {
            "images": len(rows),
            "sources": len(counts),
            "balanced_accuracy": balanced(everything)["balanced"],
            "interval": bootstrap(groups, balanced, of={"balanced": np.ones(len(truth), bool)})["balanced"],
            "chance": 1 / len(set(truth.tolist())),
        }
    return found
