"""The plot of `cxrbatch drift`: labels, the numbers of an image, and each distance beside its threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cxrbatch.ops.drift_comparison import Drift
from cxrbatch.ops.drift_statistics import ENOUGH, NUMBERS
from cxrbatch.output_file import earlier_plot, new_file
from cxrbatch.training.reference import REFUSED, Histogram, Reference

__all__ = ["plot_drift"]

_NOW, _BEFORE, _ALARM, _INK = "#2a6f97", "#8a97a3", "#d1603d", "#22303c"


def plot_drift(drift: Drift, reference: Reference | None, target: Path) -> None:
    """Write a PNG. Raises Fatal where `target` cannot be written, or is something else than an earlier plot."""
    figure = Figure((11, 7), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    span = f"{drift.span.since:%Y-%m-%d} to {drift.span.until:%Y-%m-%d}"
    figure.suptitle(f"{drift.n:,} images, {span}, against {drift.baseline}", color=_INK, fontsize=11, x=0.01, ha="left")
    rows: list[Any] = [["labels"] * 3 + ["scores"] * 3, [name for name in NUMBERS for _ in range(2)]]
    plots: dict[str, Axes] = figure.subplot_mosaic(rows)
    _labels(plots["labels"], drift, reference)
    _scores(plots["scores"], drift)
    for name in NUMBERS:
        axes = plots[name]
        axes.set_title(f"{name}, share of chest images up to it", loc="left", fontsize=9)
        histogram = None if reference is None else getattr(reference, name)
        if drift.baseline_rows is not None:
            _steps(axes, getattr(drift.baseline_rows, name), _BEFORE, "baseline")
        elif histogram is not None:
            _histogram(axes, histogram)
        _steps(axes, getattr(drift.window_rows, name), _NOW, "now")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        else:
            _nothing(axes, drift.not_compared.get(f"{name}_ks", "not known"))
    for axes in plots.values():
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with new_file(target, earlier_plot) as png:
        figure.savefig(png, format="png")


def _labels(axes: Axes, drift: Drift, reference: Reference | None) -> None:
    axes.set_title("labels, % of chest images", loc="left", fontsize=9)
    now = _mix(drift.window_rows.label)
    before = _mix(drift.baseline_rows.label) if drift.baseline_rows is not None else {}
    if drift.baseline_rows is None and reference is not None:
        total = sum(reference.labels.values()) or 1
        before = {label: 100 * n / total for label, n in reference.labels.items()}
    names = sorted({*now, *before})
    at = np.arange(len(names))
    axes.bar(at - 0.2, [before.get(name, 0) for name in names], 0.38, color=_BEFORE, label="baseline")
    axes.bar(at + 0.2, [now.get(name, 0) for name in names], 0.38, color=_NOW, label="now")
    axes.set_xticks(at, names)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _mix(labels: NDArray[np.str_]) -> dict[str, float]:
    chest = labels[~np.isin(labels, ["", *REFUSED])]
    names, counts = np.unique(chest, return_counts=True)
    return {str(name): 100 * int(n) / len(chest) for name, n in zip(names, counts, strict=True)}


def _scores(axes: Axes, drift: Drift) -> None:
    axes.set_title("distance / its threshold (above 1: drift)", loc="left", fontsize=9)
    found = drift.findings[::-1]
    if not found:
        _nothing(axes, f"fewer than {ENOUGH} images")
        return
    ratios = [finding.score / finding.threshold for finding in found]
    axes.barh(
        [finding.name for finding in found], ratios, color=[_ALARM if x.alarming else _NOW for x in found], height=0.6
    )
    axes.axvline(1, color=_ALARM, linewidth=1)


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=9, color=_BEFORE, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _steps(axes: Axes, values: NDArray[np.float64], colour: str, name: str) -> None:
    known = np.sort(values[np.isfinite(values)])
    if len(known):
        axes.step(known, np.arange(1, len(known) + 1) / len(known), where="post", color=colour, label=name)


def _histogram(axes: Axes, histogram: Histogram) -> None:
    share = np.concatenate([[0.0], np.cumsum(histogram.counts) / max(1, int(histogram.counts.sum()))])
    axes.plot(histogram.edges, share, color=_BEFORE, label="baseline")
