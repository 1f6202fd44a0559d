"""The `reference` block of a bundle's manifest: what the cascade says of images that it was made for.

`cxrbatch drift` (ops/drift.py) compares the days of a site with it. Histograms, and no row of any image.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL

__all__ = ["REFUSED", "Histogram", "Reference", "histogram", "read_reference", "reference_block"]

_BINS = 50
REFUSED = (NOT_CHEST, NOT_FRONTAL)  #: labels of what the gate refused


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges; values outside lie in the first and in the last bin."""

    edges: NDArray[np.float64]  # (bins + 1,), rising
    counts: NDArray[np.int64]  # (bins,)

    def of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many of `values` lie in each bin of this histogram."""
        inside = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.counts) - 1)
        counts: NDArray[np.int64] = np.bincount(inside, minlength=len(self.counts)).astype(np.int64)
        return counts


@dataclass(frozen=True, slots=True)
class Reference:
    """What a cascade said of its held-out home images."""

    name: str  # of the evaluation set
    n: int  # images that went through the cascade
    labels: dict[str, int]  # predicted labels of chest images
    decisions: dict[str, int]
    confidence: Histogram | None  # of chest images; None: another temperature was chosen on a site's reads
    ood_score: Histogram | None  # of chest images; None: the bundle has no such score
    gate_probability: Histogram | None  # of all images; None: the bundle has no gate
    grey_mean: Histogram | None  # of chest images; None: calibrated before there was such a number


def reference_block(
    labels: Sequence[str],
    decisions: Sequence[str],
    confidence: Sequence[float],
    ood_score: Sequence[float | None],
    gate_probability: Sequence[float | None],
    grey_mean: Sequence[float],
    *,
    set_name: str,
) -> dict[str, Any]:
    """The block, of one entry per image in each sequence (as a row of the store holds them; not rejected ones).

    `labels` of what the gate refused are in REFUSED.
    """
    chest = np.array([label not in REFUSED for label in labels], bool)
    known = [x for x, is_chest in zip(ood_score, chest, strict=True) if is_chest and x is not None]
    gate = [x for x in gate_probability if x is not None]
    return {
        "set": set_name,
        "n": len(labels),
        "labels": dict(Counter(label for label in labels if label not in REFUSED)),
        "decisions": dict(Counter(decisions)),
        "confidence": histogram(np.asarray(confidence, float)[chest]),
        "ood_score": histogram(np.asarray(known, float)) if known else None,
        "gate_probability": histogram(np.asarray(gate, float)) if gate else None,
        "grey_mean": histogram(np.asarray(grey_mean, float)[chest]),
    }


def histogram(values: NDArray[np.float64]) -> dict[str, list[float] | list[int]]:
    """A histogram of about equally full bins, as JSON: `edges` (rounded to six digits) and `counts`.

    Of no values: one bin from 0 to 1 with a count of 0.
    """
    if not len(values):
        return {"edges": [0.0, 1.0], "counts": [0]}
    edges = np.unique(np.round(np.quantile(values, np.linspace(0, 1, _BINS + 1)), 6))
    if len(edges) < 2:
        edges = np.array([edges[0], edges[0] + 1e-6])
    counts = Histogram(edges, np.zeros(len(edges) - 1, np.int64)).of(values)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def read_reference(manifest: Mapping[str, Any]) -> Reference | None:
    """The reference of a bundle; None where it has none. Raises ValueError where it is not usable."""
    block = manifest.get("reference")
    if block is None:
        return None
    try:
        return Reference(
            str(block.get("set", "")),
            int(block["n"]),
            {str(label): _count(n) for label, n in block["labels"].items()},
            {str(name): _count(n) for name, n in block["decisions"].items()},
            _histogram(block["confidence"]),
            _histogram(block.get("ood_score")),
            _histogram(block.get("gate_probability")),
            _histogram(block.get("grey_mean")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None


def _histogram(block: Mapping[str, Any] | None) -> Histogram | None:
    if block is None:
        return None
    edges, counts = [float(x) for x in block["edges"]], [_count(n) for n in block["counts"]]
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if len(edges) != len(counts) + 1 or not counts or not rising or not all(map(math.isfinite, edges)):
        raise ValueError("edges do not fit counts")
    return Histogram(np.array(edges), np.array(counts, np.int64))


def _count(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError("a count is no whole number")
    return n
