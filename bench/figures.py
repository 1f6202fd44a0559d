"""From what was measured to the figures that are shown: medians over rounds, and ratios of runs of one round."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Figure", "figures_of", "labels_agree"]

Measured = dict[str, Any]  # what one round found of one kind: "scan", "floor" and the loops by name

_LOOPS = ("batch1", "loader", "process")


@dataclass(frozen=True)
class Figure:
    """One subject on one kind of image. Neither rates nor CPU hold the start."""

    subject: str
    rate: float  # files/s
    ratio: float | None  # the scan's rate over this one, the median over rounds
    cpu_ms: float  # an image
    cpu_ratio: float | None  # this one's CPU an image over the scan's
    rss_mib: float | None
    agree: float | None  # share of images with the scan's label


def figures_of(rounds: list[dict[str, Measured]], start: list[Measured]) -> list[Figure]:
    """The figures of one kind. `start` holds the scan of one image, a round each."""
    pairs = list(zip(rounds, start, strict=True))
    scan_rates = [_scan_rate(one["scan"]) for one in rounds]
    scan_cpu = [_scan_cpu_ms(one["scan"], begun) for one, begun in pairs]
    rss = median(one["scan"]["rss_mib"] for one in rounds)
    figures = [Figure("scan", median(scan_rates), None, median(scan_cpu), None, rss, None)]
    for name in (*_LOOPS, "floor"):
        each = zip((one[name] for one in rounds), scan_rates, scan_cpu, strict=True)
        ran = [(one, rate, cpu) for one, rate, cpu in each if "failed" not in one]
        if not ran:
            continue
        rates = [_floor_rate(one) if name == "floor" else one["files"] / one["loop_s"] for one, _, _ in ran]
        costs = [_floor_cpu_ms(one) if name == "floor" else one["loop_cpu_s"] * 1e3 / one["files"] for one, _, _ in ran]
        figures.append(
            Figure(
                name,
                median(rates),
                median(scan / other for (_, scan, _), other in zip(ran, rates, strict=True)),
                median(costs),
                median(other / cpu for (_, _, cpu), other in zip(ran, costs, strict=True)),
                None if name == "floor" else median(one["rss_mib"] for one, _, _ in ran),
                None if name == "floor" else labels_agree(ran[0][0]["labels"], rounds[0]["scan"]["labels"]),
            )
        )
    return figures


def labels_agree(labels: dict[str, str], ours: dict[str, str]) -> float:
    """The share of images in `labels` that have the same label in `ours`."""
    return sum(ours.get(path) == label for path, label in labels.items()) / max(1, len(labels))


def _scan_rate(scan: Measured) -> float:
    """From the first quarter of the rows to the end of the process."""
    begun_s, begun_rows = scan["going"] or (0.0, 0)
    if begun_rows > scan["files"] / 2:  # too few images to tell the start from the rest
        begun_s, begun_rows = 0.0, 0
    return float((scan["files"] - begun_rows) / (scan["wall_s"] - begun_s))


def _scan_cpu_ms(scan: Measured, start: Measured) -> float:
    return float(1e3 * (scan["cpu_s"] - start["cpu_s"]) / (scan["files"] - 1))


def _floor_rate(floor: Measured) -> float:
    return float(floor["files"] / sum(floor["wall_s"].values()))


def _floor_cpu_ms(floor: Measured) -> float:
    return float(1e3 * sum(floor["cpu_s"].values()) / floor["files"])
