"""Would eight-bit networks do? Labels that flip against float32, and CPU time side by side.

    pip install nncf; python -m bench.int8 [--shared ../shared] [--calibrate 300]

Both stages of `default` are quantised after training (NNCF, calibrated on training films, activations of the first
and last layers as NNCF sees fit), and every test film of SHARED/data/cascade is scored both ways.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino

from cxrbatch.bundles import Stage, load_bundle
from cxrbatch.engines.openvino_engine import OpenVinoEngine
from cxrbatch.normalize import fit_plane
from cxrbatch.training.datasets import find_folders, read_films, split_films

_BATCH = 8


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--shared", type=Path, default=Path("../shared"))
    given.add_argument("--calibrate", type=int, default=300, help="training films")
    options = given.parse_args()
    films = find_folders(options.shared / "data", ("cascade",))[0].films
    train, test = split_films(films, "train"), split_films(films, "test")
    train = train[:: max(1, len(train) // options.calibrate)]
    for stage in load_bundle("default").stages:
        pictures = {name: _planes(stage, part) for name, part in (("train", train), ("test", test))}
        exact = OpenVinoEngine(threads=1)._model(stage)
        calibration = nncf.Dataset([plane[None, None] for plane in pictures["train"]])
        small = nncf.quantize(exact, calibration, preset=nncf.QuantizationPreset.MIXED, subset_size=len(train))
        runs = [_compiled(model) for model in (exact, small)]
        answers, cost = [[], []], [0.0, 0.0]  # type: ignore[var-annotated]
        for start in range(0, len(test), _BATCH):
            for which in (0, 1):
                began = time.process_time()
                answers[which].append(runs[which](pictures["test"][start : start + _BATCH, None])[0].copy())
                cost[which] += time.process_time() - began
        f32, int8 = (_probabilities(stage, np.concatenate(part)) for part in answers)
        flips = (f32.argmax(1) != int8.argmax(1)).sum()
        print(
            f"{stage.role}: {len(test)} films, {flips} labels flip ({flips / len(test):.2%}), largest change of a "
            f"probability {np.abs(f32 - int8).max():.3f}; CPU ms a film {1e3 * cost[0] / len(test):.1f} float32, "
            f"{1e3 * cost[1] / len(test):.1f} int8 ({cost[0] / cost[1]:.2f} times as fast)",
            flush=True,
        )


def _planes(stage: Stage, films: Any) -> Any:
    return np.stack([fit_plane(picture, stage.plane) for picture in read_films(films, stage.plane.size)[1]])


def _compiled(model: Any) -> Any:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(model, "CPU", settings)


def _probabilities(stage: Stage, logits: Any) -> Any:
    if logits.shape[1] == 1:
        chest = 1 / (1 + np.exp(-logits / stage.temperature))
        return np.concatenate([1 - chest, chest], 1)
    powers = np.exp((logits - logits.max(1, keepdims=True)) / stage.temperature)
    return powers / powers.sum(1, keepdims=True)


if __name__ == "__main__":
    main()
