"""Plots as PNG files, without a display: training curves, class grid, and one sheet per evaluated set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.output_file import earlier_plot, new_file
from cxrbatch.training.preparation import Prepared
from cxrbatch.types import ModelInputSpec

__all__ = ["plot_class_grid", "plot_curves", "plot_evaluation"]

_INK, _SOFT, _GRID = "#22303c", "#8a97a3", "#e3e8ec"
_COLOURS = ("#2a6f97", "#d1603d", "#6a994e", "#8e6bbf", "#c2a83e", "#5f6b76")


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure((width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=13, x=0.01, ha="left")
    return figure


def _dress(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, color=_INK, fontsize=10, loc="left")
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.tick_params(colors=_SOFT, labelsize=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)


def _save(figure: Figure, file: Path) -> None:
    with new_file(file, earlier_plot) as png:
        figure.savefig(png, format="png")


def plot_curves(history: Sequence[dict[str, Any]], file: Path) -> None:
    """Loss and accuracy of training and validation over the epochs, side by side."""
    figure = _figure(8.5, 3.4, "Training")
    epochs = [e["epoch"] + 1 for e in history]
    for place, what in enumerate(("loss", "accuracy")):
        axes = figure.add_subplot(1, 2, place + 1)
        for colour, part, name in zip(_COLOURS, ("train", "val"), ("training", "validation"), strict=False):
            axes.plot(epochs, [e[f"{part}_{what}"] for e in history], "o-", color=colour, markersize=3, label=name)
        _dress(axes, what, "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    _save(figure, file)


def plot_class_grid(images: Prepared, file: Path, columns: int = 8) -> None:
    """One row of training images per class, as the network gets them (before augmentation)."""
    labels = np.asarray(images.train_labels)
    names = images.names
    figure = _figure(columns * 1.25, len(names) * 1.45 + 0.4, "Training images by class")
    for row, name in enumerate(names):
        chosen = np.flatnonzero(labels == row)
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(columns, len(chosen))).astype(int)]
        for column in range(columns):
            axes = figure.add_subplot(len(names), columns, row * columns + column + 1)
            axes.set_axis_off()
            if column < len(chosen):
                model_input = fit_model_input(images.train_arrays[chosen[column]], ModelInputSpec(160))
                axes.imshow(model_input, cmap="gray", vmin=0, vmax=255)
            if column == 0:
                axes.set_title(f"{name} ({int((labels == row).sum())})", color=_INK, fontsize=9, loc="left")
    _save(figure, file)


def plot_evaluation(name: str, found: dict[str, Any], classes: Sequence[str], out: Path) -> None:
    """One sheet: confusion, ROC, reliability, selective accuracy; for images of no known class, their labels."""
    if "disease" not in found:
        _plot_others(name, found, classes, out)
        return
    disease = found["disease"]
    interval = disease["intervals"]["balanced_accuracy"]
    figure = _figure(
        10.5,
        8.6,
        f"{name}: {disease['images']} images, balanced accuracy {100 * disease['balanced_accuracy']:.1f} % "
        f"(95 %: {100 * interval[0]:.1f} to {100 * interval[1]:.1f})",
    )
    grid = figure.subplots(2, 2)
    _confusion(grid[0, 0], np.asarray(disease["confusion"]), classes)
    _roc(grid[0, 1], disease)
    _reliability(grid[1, 0], disease)
    _coverage(grid[1, 1], disease, found["end_to_end"])
    _save(figure, out / f"{name}.png")


def _plot_others(name: str, found: dict[str, Any], classes: Sequence[str], out: Path) -> None:
    figure = _figure(10.5, 3.8, f"{name}: {found['images']} images of no class that the disease model knows")
    left, right = figure.subplots(1, 2)
    if "gate" in found:
        _gate(left, found["gate"])
    else:
        left.set_axis_off()
    _called(right, found["called"], [*classes, "NOT_CHEST"])
    _save(figure, out / f"{name}.png")


def _gate(axes: Axes, gate: dict[str, Any]) -> None:
    edges = np.linspace(0, 1, 21)
    for colour, (kind, counts) in zip(_COLOURS, gate["histogram"].items(), strict=False):
        if sum(counts):
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.75, label=f"{kind} ({sum(counts)})")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    _dress(axes, "Gate", "probability of a chest image", "images")
    axes.legend(frameon=False, fontsize=8, loc="upper center")


def _called(axes: Axes, called: dict[str, Any], answers: Sequence[str]) -> None:
    """One bar per label: the share of each answer, and the share that goes to review."""
    for row, found in enumerate(called.values()):
        start = 0.0
        for colour, answer in zip(_COLOURS, answers, strict=False):
            share = found["called"][answer] / found["images"]
            axes.barh(row, share, 0.6, left=start, color=colour, label=answer if row == 0 else None)
            if share > 0.06:
                axes.text(start + share / 2, row, found["called"][answer], ha="center", va="center", color="white")
            start += share
    _dress(axes, "Called", "share of the images")
    labels = [f"{label}\n{100 * found['sent_to_review']:.0f} % to review" for label, found in called.items()]
    axes.set_yticks(range(len(called)), labels)
    axes.set_ylim(-0.6, len(called) - 0.4)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.08))


def _confusion(axes: Axes, counts: Any, classes: Sequence[str]) -> None:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            text = f"{counts[i, j]}\n{100 * shares[i, j]:.0f} %" if counts[i].sum() else "-"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if shares[i, j] > 0.55 else _INK)
    _dress(axes, "Confusion", "called", "is")
    axes.grid(visible=False)
    short = [c if len(c) < 10 else c[:8] + "." for c in classes]
    axes.set_xticks(range(len(classes)), short)
    axes.set_yticks(range(len(classes)), short)


def _roc(axes: Axes, disease: dict[str, Any]) -> None:
    for colour, (label, points) in zip(_COLOURS, disease["roc"].items(), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, label=f"{label}  {disease['auc'][label]:.3f}")
    axes.plot([0, 1], [0, 1], color=_GRID, zorder=0)
    _dress(axes, "ROC, each class against the rest", "false-positive rate", "recall")
    axes.legend(frameon=False, fontsize=8, title="area under curve", title_fontsize=8, loc="lower right")


def _reliability(axes: Axes, disease: dict[str, Any]) -> None:
    rows = disease["reliability"]
    total = sum(r["count"] for r in rows)
    axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle="--")
    axes.bar([r["confidence"] for r in rows], [r["count"] / total for r in rows], 0.04, color=_GRID, label="images")
    axes.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], "o-", color=_COLOURS[0], markersize=4)
    _dress(axes, f"Reliability, expected calibration error {disease['ece']:.3f}", "confidence", "share that is right")
    axes.set_xlim(0.2, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _coverage(axes: Axes, disease: dict[str, Any], end: dict[str, float]) -> None:
    rows = disease["coverage"]
    axes.plot([r["coverage"] for r in rows], [r["accuracy"] for r in rows], "o-", color=_COLOURS[1], markersize=3)
    axes.axvline(1 - end["sent_to_review"], color=_SOFT, linewidth=1, linestyle="--")
    low = min(r["accuracy"] for r in rows)
    axes.text(1 - end["sent_to_review"], low, " reported | review ", ha="center", fontsize=8, color=_SOFT)
    _dress(axes, "Accuracy of the most confident images", "share of images kept", "accuracy")
