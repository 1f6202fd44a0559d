"""Would eight-bit networks do? Labels that flip against float32, and CPU time side by side.

    pip install nncf; python -m bench.int8 [--shared ../shared] [--calibrate 300]

Both stages of `default` are quantised after training (NNCF, calibrated on training images, activations of the first
and last layers as NNCF sees fit), and every test image of SHARED/data/cascade is scored both ways.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.bundle import ModelSpec, load_bundle
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.training.datasets import find_folders, read_images, split_images

_BATCH = 8


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--shared", type=Path, default=Path("../shared"))
    given.add_argument("--calibrate", type=int, default=300, help="training images")
    options = given.parse_args()
    images = find_folders(options.shared / "data", ("cascade",))[0].images
    train, test = split_images(images, "train"), split_images(images, "test")
    train = train[:: max(1, len(train) // options.calibrate)]
    for stage in load_bundle("default").stages:
        arrays = {name: _model_inputs(stage, part) for name, part in (("train", train), ("test", test))}
        exact = OpenVinoEngine(threads=1)._model(stage)
        calibration = nncf.Dataset([model_input[None, None] for model_input in arrays["train"]])
        small = nncf.quantize(exact, calibration, preset=nncf.QuantizationPreset.MIXED, subset_size=len(train))
        runs = [_compiled(model) for model in (exact, small)]
        answers, cost = [[], []], [0.0, 0.0]  # type: ignore[var-annotated]
        for start in range(0, len(test), _BATCH):
            for which in (0, 1):
                began = time.process_time()
                answers[which].append(runs[which](arrays["test"][start : start + _BATCH, None])[0].copy())
                cost[which] += time.process_time() - began
        f32, int8 = (_probabilities(stage, np.concatenate(part)) for part in answers)
        flips = (f32.argmax(1) != int8.argmax(1)).sum()
        print(
            f"{stage.role}: {len(test)} images, {flips} labels flip ({flips / len(test):.2%}), largest change of a "
            f"probability {np.abs(f32 - int8).max():.3f}; CPU ms an image {1e3 * cost[0] / len(test):.1f} float32, "
            f"{1e3 * cost[1] / len(test):.1f} int8 ({cost[0] / cost[1]:.2f} times as fast)",
            flush=True,
        )


def _model_inputs(stage: ModelSpec, images: Any) -> Any:
    return np.stack(
        [fit_model_input(array, stage.model_input) for array in read_images(images, stage.model_input.size)[1]]
    )


def _compiled(model: Any) -> Any:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(model, "CPU", settings)


def _probabilities(stage: ModelSpec, logits: Any) -> Any:
    if logits.shape[1] == 1:
        chest = 1 / (1 + np.exp(-logits / stage.temperature))
        return np.concatenate([1 - chest, chest], 1)
    powers = np.exp((logits - logits.max(1, keepdims=True)) / stage.temperature)
    return powers / powers.sum(1, keepdims=True)


if __name__ == "__main__":
    main()
