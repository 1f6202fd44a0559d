"""The ranges of a recipe's numbers: beyond them training fails half-way, or learns nothing and does not say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["RANGES", "out_of_range"]

_SHARE = (0.0, 1.0)
_PIXELS = (8, 4096)  # as large as a bundle's may be
_RATE = (1e-12, 1e38)
#: key -> (least, greatest); the key of a number in a list or a table is the list's
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "model_input.size": _PIXELS,
    "phases.size": _PIXELS,
    "phases.frozen": (-1, 19),
    "phases.learning_rate": _RATE,
    "phases.source_power": _SHARE,
    "source_power": _SHARE,
    "source_weights": (1e-9, 1e9),
    "samples": (0, 1e9),
    "label_smoothing": _SHARE,
    "mixup": (0, 100),
    "mixstyle": _SHARE,
    "average": _SHARE,
    "optimiser.learning_rate": _RATE,
    "optimiser.momentum": _SHARE,
    "optimiser.weight_decay": (0, 100),
    "schedule.milestones": (0, 1e6),
    "schedule.factor": _SHARE,
    "schedule.patience": (0, 1e6),
    "schedule.warm_up": (0, 1e9),
    **dict.fromkeys((f"augmentation.{name}" for name in ("flip", "look", "turn", "invert", "thumbnail")), _SHARE),
    **dict.fromkeys((f"augmentation.{name}" for name in ("surroundings", "scramble")), _SHARE),
    **dict.fromkeys((f"augmentation.{name}" for name in ("brightness", "contrast", "saturation")), (0, 10)),
    "augmentation.rotation": (0, 180),
    "augmentation.hue": (0, 0.5),
    "augmentation.crop": (0, 0.9),
    "augmentation.aspect": (1, 10),
}


def out_of_range(recipe: Any) -> str:
    """Which number of a recipe is out of its range, in words; "" if none is."""
    for shown, key, number in _numbers(recipe, "", ""):
        if key in RANGES and not RANGES[key][0] <= number <= RANGES[key][1]:
            return f"{shown} is {number} and must be from {RANGES[key][0]:g} to {RANGES[key][1]:g}"
    if recipe.samples == 1:
        return "batch norm needs samples of at least 2, or 0 for as many as there are"
    return ""


def _numbers(value: Any, shown: str, key: str) -> Iterator[tuple[str, str, float]]:
    """All numbers below `value`: as the user would name them, as RANGES does, and themselves."""
    if is_dataclass(value):
        for one in fields(value):
            dot = "." if key else ""
            yield from _numbers(getattr(value, one.name), f"{shown}{dot}{one.name}", f"{key}{dot}{one.name}")
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, f"{shown}[{place}]", key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{shown}.{name}", key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield shown, key, value
