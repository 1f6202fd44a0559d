"""How far a window of days is from a baseline, and how far it may be by chance. numpy only.

Images of one day are not independent (one ward, one machine), so chance is estimated from days, not from images: of
the days of window and baseline together, as many as the window has are drawn and compared with the rest. 1,000 such
draws give the thresholds, which all statistics together pass in one of a hundred windows without any change. Where the
baseline is a histogram without days (the reference of a bundle), images are drawn from it instead, fewer by the design
effect of the window's own days (Kish 1965).

Effect sizes, not p-values: a p-value of a large window finds any difference, a threshold at the same n does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.training.reference import REFUSED, Reference

__all__ = ["ENOUGH", "NUMBERS", "STATISTICS", "Finding", "Rows", "compare_days", "compare_reference", "wilson"]

ENOUGH = 200  # images; below it every threshold would be so high that nothing is found
_BINS = 50
_RESAMPLES = 1_000
_FALSE_ALARMS = 0.01  # of windows without any change
_GROUPS = 5  # coarse bins of which the design effect is taken
_ENOUGH_DAYS = 5  # to tell how much days differ
_Z = 2.576  # of a normal distribution, two-sided 1 %

Counts = NDArray[Any]  # whole numbers
#: What is compared: the parts of a day's images in bins, by the name of the statistic.
STATISTICS = ("label_psi", "confidence_ks", "ood_score_ks", "grey_mean_ks", "gate_rate", "unlike_rate", "reject_rate")
#: Numbers of a chest image whose distributions are compared; the statistic is named after it.
NUMBERS = ("confidence", "ood_score", "grey_mean")
RATES = ("gate_rate", "unlike_rate", "reject_rate")


@dataclass(frozen=True, slots=True)
class Rows:
    """Files with a final outcome, one entry each; NaN where a number does not apply."""

    day: NDArray[np.int64]  # any number that is the same for the same day
    label: NDArray[np.str_]  # "" for a rejected file
    confidence: NDArray[np.float64]
    ood_score: NDArray[np.float64]
    grey_mean: NDArray[np.float64]
    gate_probability: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.day)

    @property
    def scored(self) -> int:
        """Images that went through the cascade."""
        return int((self.label != "").sum())


@dataclass(frozen=True, slots=True)
class Finding:
    """One statistic: how far the window is from the baseline, and from where on that is alarming."""

    name: str
    score: float
    threshold: float
    window: float | None = None  # of a rate: the rate itself, with its Wilson interval
    window_interval: tuple[float, float] | None = None
    baseline: float | None = None

    @property
    def alarming(self) -> bool:
        return self.score > self.threshold


def compare_days(window: Rows, baseline: Rows, seed: int = 0) -> list[Finding]:
    """The window against other days of the same site, none of which may be in the window."""
    both = Rows(*(np.concatenate([getattr(rows, name) for rows in (window, baseline)]) for name in Rows.__slots__))
    labels = sorted(set(map(str, np.unique(both.label))) - {"", *REFUSED})
    edges = {name: _edges(getattr(both, name)) for name in NUMBERS}
    parts = _by_day(both, labels, edges)
    is_window = np.isin(np.unique(both.day), window.day)
    ours = {name: part[is_window].sum(0) for name, part in parts.items()}
    theirs = {name: part[~is_window].sum(0) for name, part in parts.items()}
    names = [name for name in STATISTICS if _is_told(name, ours) and _is_told(name, theirs)]
    # Which days are the window is shuffled: without a change, each choice is as likely as the real one.
    chance = np.random.default_rng(seed)
    shuffled = chance.permuted(np.tile(is_window, (_RESAMPLES, 1)), axis=1).astype(float)
    by_chance = {name: _distance(name, shuffled @ parts[name], (1 - shuffled) @ parts[name]) for name in names}
    return _findings(names, ours, theirs, by_chance)


def compare_reference(window: Rows, reference: Reference, has_gate: bool, seed: int = 0) -> list[Finding]:
    """The window against what the bundle said of its own held-out images, which holds no rejected files."""
    labels = sorted({*reference.labels, *map(str, np.unique(window.label))} - {"", *REFUSED})
    theirs = {"label_psi": np.array([reference.labels.get(label, 0) for label in labels], np.int64)}
    histograms = {name: known for name in NUMBERS if (known := getattr(reference, name)) is not None}
    edges = {name: known.edges for name, known in histograms.items()}
    theirs |= {f"{name}_ks": known.counts for name, known in histograms.items()}
    not_chest = reference.n - sum(reference.labels.values())
    if has_gate:
        theirs["gate_rate"] = np.array([not_chest, reference.n - not_chest], np.int64)
    by_day = _by_day(window, labels, edges)
    ours = {name: part.sum(0) for name, part in by_day.items()}
    chance = np.random.default_rng(seed)
    names = [name for name in STATISTICS if _is_told(name, ours) and _is_told(name, theirs)]
    by_chance = {}
    for name in names:
        part = by_day[name]
        n = max(1, round(int(part.sum()) / _design_effect(part)))
        # Half a count more in each bin: what the reference never saw may still come once (Jeffreys 1946).
        share = (theirs[name] + 0.5) / (theirs[name].sum() + 0.5 * len(theirs[name]))
        ours_again, theirs_again = (
            chance.multinomial(size, share, _RESAMPLES) for size in (n, int(theirs[name].sum()))
        )
        by_chance[name] = _distance(name, ours_again, theirs_again)
    return _findings(names, ours, theirs, by_chance)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927); (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    rate, square = hits / n, z * z / n
    middle, half = rate + square / 2, z * math.sqrt(rate * (1 - rate) / n + square / (4 * n))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def psi(a: Counts, b: Counts) -> NDArray[np.float64]:
    """Population stability index of mixes (..., classes); half a count is added to each: no class is empty."""
    p, q = ((x + 0.5) / (x.sum(-1, keepdims=True) + 0.5 * x.shape[-1]) for x in (a, b))
    index: NDArray[np.float64] = ((p - q) * np.log(p / q)).sum(-1)
    return index


def ks(a: Counts, b: Counts) -> NDArray[np.float64]:
    """The largest distance of cumulative distributions (..., bins) at their edges (Kolmogorov, Smirnov)."""
    p, q = (np.cumsum(x, -1) / np.maximum(1, x.sum(-1, keepdims=True)) for x in (a, b))
    largest: NDArray[np.float64] = np.abs(p - q).max(-1)
    return largest


def _is_told(name: str, counts: dict[str, Counts]) -> bool:
    """Whether there is something to compare: of a number, in at least half of the chest images.

    Days from before a number was stored would otherwise count as days without images.
    """
    known = int(counts[name].sum()) if name in counts else 0
    return known > 0 and (not name.endswith("_ks") or 2 * known >= int(counts["label_psi"].sum()))


def _distance(name: str, a: Counts, b: Counts) -> NDArray[np.float64]:
    return psi(a, b) if name.endswith("_psi") else ks(a, b)  # of two bins, ks is the difference of the rates


def _findings(
    names: list[str], ours: dict[str, Counts], theirs: dict[str, Counts], by_chance: dict[str, NDArray[np.float64]]
) -> list[Finding]:
    if not names:
        return []
    # One in a hundred for all statistics together: each is measured by its own spread, the largest of them counts.
    own = {name: max(_quantile(by_chance[name]), 1e-9) for name in names}
    largest = np.max([by_chance[name] / own[name] for name in names], 0)
    together = max(1.0, _quantile(largest))
    found = []
    for name in names:
        a, b = ours[name], theirs[name]
        score, threshold = float(_distance(name, a, b)), own[name] * together
        if name in RATES:
            n, m = int(a.sum()), int(b.sum())
            rate, interval = float(a[0] / n), wilson(int(a[0]), n)
            found.append(Finding(name, score, threshold, rate, interval, float(b[0] / m)))
        else:
            found.append(Finding(name, score, threshold))
    return found


def _quantile(values: NDArray[np.float64]) -> float:
    """What one of a hundred draws passes; never more."""
    return float(np.quantile(values, 1 - _FALSE_ALARMS, method="higher"))


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = values[np.isfinite(values)]
    if not len(known):
        return np.array([0.0, 1.0])
    edges: NDArray[np.float64] = np.unique(np.quantile(known, np.linspace(0, 1, _BINS + 1)))
    return edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1e-6])


def _by_day(rows: Rows, labels: list[str], edges: dict[str, NDArray[np.float64]]) -> dict[str, Counts]:
    """Counts by day and bin, (days, bins) for each statistic, days in rising order.

    A rate has two bins, of which the first holds what the rate counts.
    """
    days, day = np.unique(rows.day, return_inverse=True)
    scored, chest = rows.label != "", ~np.isin(rows.label, ["", *REFUSED])

    def counted(which: NDArray[np.bool_], bins: NDArray[np.int64], size: int) -> Counts:
        table = np.zeros((len(days), size), np.int64)
        np.add.at(table, (day[which], bins), 1)
        return table

    code_of = {label: code for code, label in enumerate(labels)}
    codes = np.array([code_of[label] for label in rows.label[chest].tolist()], np.int64)
    parts = {
        "label_psi": counted(chest, codes, max(1, len(labels))),
        "gate_rate": counted(scored, np.where(np.isin(rows.label[scored], REFUSED), 0, 1), 2),
        "reject_rate": counted(np.ones(len(rows), bool), np.where(scored, 1, 0), 2),
    }
    for name, borders in edges.items():
        values = getattr(rows, name)
        known = chest & np.isfinite(values)
        inside = np.clip(np.searchsorted(borders, values[known], side="right") - 1, 0, len(borders) - 2)
        parts[f"{name}_ks"] = counted(known, inside, len(borders) - 1)
    known = chest & np.isfinite(rows.ood_score)
    parts["unlike_rate"] = counted(known, np.where(rows.ood_score[known] > 1, 0, 1), 2)
    return parts


def _design_effect(part: Counts) -> float:
    """By how much the mix of days varies more than that of as many independent images; at least 1."""
    part = part[part.sum(1) > 0]
    if len(part) < _ENOUGH_DAYS:
        return 1.0
    total = part.sum(0)
    group = np.minimum((np.cumsum(total) - total / 2) * _GROUPS // max(1, total.sum()), _GROUPS - 1).astype(int)
    if part.shape[1] <= _GROUPS:
        group = np.arange(part.shape[1])
    coarse = np.zeros((len(part), group.max() + 1))
    np.add.at(coarse.T, group, part.T)
    share, n = coarse.sum(0) / coarse.sum(), coarse.sum(1)
    between = (n[:, None] * (coarse / n[:, None] - share) ** 2).sum(0)
    within = share * (1 - share)
    effect = float(between.sum() / ((len(part) - 1) * max(float(within.sum()), 1e-12)))
    if effect <= 1:
        return 1.0
    # A variance known from few days is not known well: as Student's t is wider than the normal distribution.
    return effect * (1 + (_Z**2 + 1) / (2 * (len(part) - 1)))
