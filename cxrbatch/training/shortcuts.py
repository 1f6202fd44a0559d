"""Does the network look at lungs, or at where the film comes from? Checks for the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cxrbatch.bundles import Stage
from cxrbatch.normalize import fit_plane
from cxrbatch.training.datasets import Film, read_film
from cxrbatch.training.gradcam import grad_cam, load_network, network_input
from cxrbatch.training.metrics import bootstrap

__all__ = ["cam_outside", "source_probe"]

_CENTRAL = 0.8  # share of a side that counts as the chest, in the middle


def cam_outside(stage: Stage, films: Sequence[Film]) -> tuple[float, list[float]]:
    """Mean share of Grad-CAM mass outside the central chest, for the class that is called, and its 95 % interval.

    The central chest is the middle 80 % of each side of the film itself (not of its black padding); a map
    without preference has 36 % of its mass outside.
    """
    net = load_network(stage)
    shares, groups = [], []
    for film in films:
        picture = read_film(film.path)
        x = network_input(fit_plane(picture, stage.plane)[None], stage)
        with torch.no_grad():
            called = net(x)[0].argmax(1)
        size = stage.plane.size
        cam = functional.interpolate(grad_cam(net, x, called)[None], (size, size), mode="bilinear")[0, 0].numpy()
        inside = _central(picture.shape[0], picture.shape[1], stage)
        if cam.sum() > 0:
            shares.append(float(cam[~inside].sum() / cam.sum()))
            groups.append(film.group)
    each = np.array(shares)
    return float(each.mean()), bootstrap(groups, lambda rows: {"mean": float(each[rows].mean())})["mean"]


def _central(rows: int, columns: int, stage: Stage) -> NDArray[np.bool_]:
    size = stage.plane.size
    scale = size / max(rows, columns)
    height, width = (size, size) if stage.plane.fit == "stretch" else (rows * scale, columns * scale)
    y, x = np.mgrid[0:size, 0:size] + 0.5 - size / 2
    central: NDArray[np.bool_] = (np.abs(y) <= _CENTRAL * height / 2) & (np.abs(x) <= _CENTRAL * width / 2)
    return central


def source_probe(features: NDArray[np.float32], films: Sequence[Film], seed: int = 0) -> dict[str, Any]:
    """How well a linear probe tells the source of a film from its features, within one class.

    Within a class disease can't help it, so whatever it finds is the look of a hospital. Only labels with
    several sources count; half of the films train it and half test it. `chance` is one in the number of sources.
    """
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    found = {}
    for label in sorted({f.label for f in films}):
        rows = np.array([i for i, f in enumerate(films) if f.label == label])
        sources = np.array([films[i].source for i in rows])
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
        groups = [films[i].group for i in rows[order[half:]]]
        found[label] = {
            "films": len(rows),
            "sources": len(counts),
            "balanced_accuracy": balanced(everything)["balanced"],
            "interval": bootstrap(groups, balanced, of={"balanced": np.ones(len(truth), bool)})["balanced"],
            "chance": 1 / len(set(truth.tolist())),
        }
    return found
