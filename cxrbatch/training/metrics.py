"""The figures of an evaluation, in numpy. y: true classes (n,), p: calibrated probabilities (n, k)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "auc",
    "balanced_accuracy",
    "best_temperature",
    "bootstrap",
    "calibration_error",
    "class_table",
    "confusion",
    "coverage_curve",
    "reliability",
    "share_interval",
    "without_nan",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion(y: Ints, guess: Ints, k: int) -> Ints:
    """Counts (k, k): rows are the truth, columns the guess."""
    counts: Ints = np.bincount(y * k + guess, minlength=k * k).reshape(k, k)
    return counts


def balanced_accuracy(y: Ints, guess: Ints) -> float:
    """The mean recall of the classes that occur in y."""
    return float(np.mean([np.mean(guess[y == c] == c) for c in np.unique(y)]))


def class_table(counts: Ints) -> list[dict[str, float]]:
    """Precision, recall, F1 and support of each class; NaN where undefined."""
    table = []
    for c in range(len(counts)):
        hit, said, there = float(counts[c, c]), float(counts[:, c].sum()), float(counts[c].sum())
        table.append(
            {
                "precision": hit / said if said else float("nan"),
                "recall": hit / there if there else float("nan"),
                "f1": 2 * hit / (said + there) if said + there else float("nan"),
                "support": int(there),
            }
        )
    return table


def auc(positive: NDArray[np.bool_], score: Floats) -> float:
    """Area under the ROC curve (Mann-Whitney, ties count half); NaN when one side is empty."""
    n = int(positive.sum())
    m = len(positive) - n
    if not n or not m:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def reliability(y: Ints, p: Floats, bins: int = 15) -> list[dict[str, float]]:
    """Accuracy in equal-width bins of confidence. Empty bins are left out."""
    confidence, right = p.max(1), p.argmax(1) == y
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
            "count": int((place == b).sum()),
        }
        for b in np.unique(place)
    ]


def calibration_error(y: Ints, p: Floats, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean |confidence - accuracy| over bins, by count."""
    return sum(r["count"] * abs(r["confidence"] - r["accuracy"]) for r in reliability(y, p, bins)) / len(y)


def coverage_curve(right: NDArray[np.bool_], confidence: Floats, points: int = 20) -> list[dict[str, float]]:
    """Accuracy of the most confident share of the images, for shares up to 1."""
    order = np.argsort(-confidence, kind="stable")
    good = np.cumsum(right[order])
    sizes = sorted({max(1, round(len(right) * i / points)) for i in range(1, points + 1)})
    return [{"coverage": n / len(right), "accuracy": float(good[n - 1] / n)} for n in sizes]


def bootstrap(
    groups: Sequence[str],
    figures: Callable[[NDArray[np.int64]], dict[str, float]],
    draws: int = 500,
    seed: int = 1,
    *,
    of: Mapping[str, NDArray[np.bool_]] | None = None,
) -> dict[str, list[float]]:
    """95 % percentile intervals from a bootstrap: whole groups (patients) are drawn with replacement.

    `figures` takes row numbers and returns named numbers; draws in which a number is NaN are ignored for it.
    `of` names the rows (n,) that a share refers to. If all of them are right, or none, every draw gives the same value.
    The bootstrap interval degenerates here; use Clopper-Pearson (the exact bound for this number of patients).
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(member, kind="stable")
    starts = np.searchsorted(member[order], np.arange(member.max() + 2))
    rows_of = [order[starts[g] : starts[g + 1]] for g in range(member.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(draws):
        rows = np.concatenate([rows_of[g] for g in rng.integers(0, len(rows_of), len(rows_of))])
        for name, value in figures(rows).items():
            drawn.setdefault(name, []).append(value)
    found = {name: _interval(np.asarray(values)) for name, values in drawn.items()}
    for name, rows_of_share in (of or {}).items():
        patients = len(np.unique(member[rows_of_share]))
        if patients and found[name] in ([0.0, 0.0], [1.0, 1.0]):
            bound = 0.025 ** (1 / patients)
            found[name] = [bound, 1.0] if found[name][0] else [0.0, 1 - bound]
    return found


def share_interval(groups: Sequence[str], right: NDArray[np.bool_], draws: int = 500) -> list[float]:
    """95 % interval of the share of `right` (n,), by group as `bootstrap` does it."""
    everything = {"share": np.ones(len(right), bool)}
    return bootstrap(groups, lambda rows: {"share": float(right[rows].mean())}, draws, of=everything)["share"]


def _interval(values: Floats) -> list[Any]:
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else [float("nan")] * 2


def best_temperature(logits: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood, by golden-section search on its logarithm.

    logits (n, k), y (n,); the answer is between 1/20 and 20.
    """

    def loss(log_t: float) -> float:
        z = logits / np.exp(log_t)
        z = z - z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]).mean())

    low, high = -np.log(20), np.log(20)
    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-5:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def without_nan(value: Any) -> Any:
    """NaN becomes null: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
