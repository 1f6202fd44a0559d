"""Evaluate a bundle (gate and disease model together) on labelled files, with intervals and by source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines import open_engine
from cxrbatch.output_file import new_file, starts_with
from cxrbatch.training import metrics
from cxrbatch.training.calibration_images import own_folders
from cxrbatch.training.datasets import SPLITS, find_folders, known_patients, leaked_images, split_images
from cxrbatch.training.figures import measure
from cxrbatch.training.scores import Scores, score_images, under_class_names

__all__ = ["evaluate"]


def evaluate(
    bundle: Path,
    data: Path,
    out: Path | None = None,
    *,
    split: str = "test",
    draws: int = 500,
    without_sources: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a bundle on every labelled folder in `data` that has images of `split`.

    Labels that are classes of the bundle give the full figures; CHEST, NOT_CHEST and LATERAL judge the gate; of any
    other label it is only said what the bundle calls it. A set stands a second time without test images whose bytes are
    a training image's in `data` too, as NAME-leak-free, and a third time without patients of whom the folders that
    the bundle was trained on have a training image, as NAME-new-patients. Writes `out`/evaluation.json and plots.
    Raises Fatal when nothing can be read, or there is no image of that split.
    """
    if split not in SPLITS:
        raise Fatal(f"The split '{split}' is none of {', '.join(SPLITS)}.", ExitCode.USAGE)
    loaded = load_bundle(bundle)
    engine = open_engine("auto", "auto", loaded)
    result: dict[str, Any] = {
        "bundle": loaded.name,
        "version": loaded.version,
        "manifest_sha256": loaded.manifest_sha256,
        "engine": f"{engine.name} {engine.version} on {engine.device}",
        "split": split,
        "without_sources": list(without_sources),
        "sets": {},
    }
    kept: dict[str, Scores] = {}
    folders = find_folders(data)
    for name in without_sources:
        if not any(name in image.source for folder in folders for image in split_images(folder.images, split)):
            raise Fatal(f"No {split} image in {data} has a source with '{name}' in its name.")
    judged = folders if split == "test" else []
    leaks = {image.path for image in leaked_images(judged)}
    named = {name for stage in loaded.stages for name in own_folders(stage)}
    known = known_patients(judged, [folder for folder in judged if folder.name in named] or judged)
    without = {"leak-free": leaks, "new-patients": leaks | {image.path for image in known}}
    for folder in folders:
        of_split = split_images(folder.images, split)
        images = [image for image in of_split if not any(name in image.source for name in without_sources)]
        if not images:
            continue
        scores = score_images(loaded, under_class_names(images, loaded), engine)
        if scores.images:
            kept[folder.name] = scores
            rest = len(scores.images)
            for name, left_out in without.items():
                clean = np.array([image.path not in left_out for image in scores.images])
                if 0 < clean.sum() < rest:
                    kept[f"{folder.name}-{name}"] = scores.chosen(clean)
                    rest = clean.sum()
        if scores.unreadable:
            result.setdefault("unreadable", []).extend([f.path.as_posix(), why] for f, why in scores.unreadable)
    if not kept:
        raise Fatal(f"{data} has no readable image of the split '{split}': put some into {data / split}/<class>/.")
    for name, scores in kept.items():
        result["sets"][name] = measure(scores, loaded.disease.classes, draws)
    if out is not None:
        from cxrbatch.training.plots import plot_evaluation

        out.mkdir(parents=True, exist_ok=True)
        with new_file(out / "evaluation.json", starts_with(b'{\n "bundle": ')) as file:
            file.write((json.dumps(metrics.without_nan(result), indent=1) + "\n").encode())
        for name in kept:
            plot_evaluation(name, result["sets"][name], loaded.disease.classes, out)
    return result
