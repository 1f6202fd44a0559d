"""The bench as one image: what an image costs each way, and how many images a second that makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.inputs import KINDS
from bench.report import all_figures

__all__ = ["draw"]

_SUBJECTS = {
    "scan": ("cxrbatch scan", "#1b7f5c"),
    "batch1": ("loop, batch 1", "#c9713a"),
    "loader": ("DataLoader, 2 × 32", "#dba15c"),
    "process": ("process_batch shape", "#b9b4a7"),
}
_SHORT = {
    "jpeg1024": "JPEG\n1024 px",
    "jpeg2000": "JPEG\n2000 px",
    "png1024": "PNG\n1024 px",
    "raw": "DICOM\nraw",
    "jpegll": "DICOM\nJPEG lossless",
    "j2k": "DICOM\nJPEG 2000",
    "real": "real images\n(small)",
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Two panels to a PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patheffects import withStroke

    figures = all_figures(found)
    kinds = [kind.name for kind in KINDS if kind.name in figures]
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    image, (rates, costs) = pyplot.subplots(2, 1, figsize=(10, 7.2), sharex=True, layout="constrained")
    width = 0.8 / len(_SUBJECTS)
    halo = withStroke(linewidth=3, foreground="white")  # a figure stays legible where the floor crosses it
    for number, (subject, (title, colour)) in enumerate(_SUBJECTS.items()):
        for axes, field in ((rates, "rate"), (costs, "cpu_ms")):
            there = [(i, f) for i, kind in enumerate(kinds) for f in figures[kind] if f.subject == subject]
            places = [i - 0.4 + (number + 0.5) * width for i, _ in there]
            values = [getattr(f, field) for _, f in there]
            bars = axes.bar(places, values, width * 0.92, color=colour, label=title)
            if subject == "scan" or field == "rate":
                labels = [f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in values]
                weight = "bold" if subject == "scan" else "normal"
                axes.bar_label(bars, labels, padding=2, fontsize=8, fontweight=weight, path_effects=[halo], zorder=4)
    for i, kind in enumerate(kinds):
        for figure in figures[kind]:
            if figure.subject == "floor":
                for axes, value in ((rates, figure.rate), (costs, figure.cpu_ms)):
                    axes.hlines(value, i - 0.4, i - 0.4 + width, color="#12324a", linewidth=2, zorder=3)
    rates.plot([], [], color="#12324a", linewidth=2, label="the floor: sum of the stages")
    rates.set_yscale("log")
    rates.set_ylabel("images a second")
    rates.legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=5, frameon=False, fontsize=9)
    costs.set_yscale("log")
    costs.set_ylabel("CPU ms an image")
    costs.set_xticks(range(len(kinds)), [_SHORT[kind] for kind in kinds])
    for axes in (rates, costs):
        axes.grid(axis="y", color="#e6e3dc", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
    this = found["machine"]
    note = f"{this['cores']} cores, {this['cpu']}; {this['date']}; same images and weights, without starts; log scales"
    image.supxlabel(note, fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(path, dpi=130)
    pyplot.close(image)
