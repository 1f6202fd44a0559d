"""OpenVINO on CPU: several times faster than PyTorch there, and ready without importing it.

The network is converted from the bundle's weights at first use (this needs PyTorch, seconds, once) and kept in the
cache folder under the hash of everything that it was made from. Numbers are float32 throughout: on processors with
bfloat16, OpenVINO would use it unasked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from cxrbatch.bundles import Stage
from cxrbatch.engines.protocol import Network

__all__ = ["OpenVinoEngine", "cache_folder"]

_CONVERSION = 1  # raise when what is converted changes


def cache_folder() -> Path:
    """Where converted networks are kept: $XDG_CACHE_HOME/cxrbatch or ~/.cache/cxrbatch. May be deleted any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrbatch"


class OpenVinoEngine:
    """One compiled network a stage; OpenVINO's own threads use all cores."""

    name = "openvino"
    version = str(openvino.__version__).split("-")[0]
    device = "cpu"

    def __init__(self) -> None:
        self._core = openvino.Core()

    def load(self, stage: Stage) -> Network:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = self._core.compile_model(self._model(stage), "CPU", settings)
        request = compiled.create_infer_request()

        def run(planes: NDArray[np.uint8], /) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            request.infer({0: np.ascontiguousarray(planes)[:, None]})
            logits, features = (request.get_output_tensor(i).data for i in (0, 1))
            return np.array(logits, np.float32), np.array(features, np.float32)

        return run

    def _model(self, stage: Stage) -> Any:
        """The converted network, from the cache where it is there; written whole or not at all."""
        kept = cache_folder() / f"{_key(stage)}.xml"
        try:
            return self._core.read_model(kept)
        except RuntimeError:  # not there, or damaged: make it
            model = _convert(stage)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                made = Path(folder) / kept.name
                openvino.save_model(model, made, compress_to_fp16=False)
                os.replace(made.with_suffix(".bin"), kept.with_suffix(".bin"))
                os.replace(made, kept)
        except OSError:
            pass  # no place to keep it: the next start converts again
        return model


def _key(stage: Stage) -> str:
    made_from = [stage.sha256, stage.architecture, stage.channels, stage.plane.size, stage.mean, stage.std]
    return hashlib.sha256(json.dumps([*made_from, _CONVERSION, openvino.__version__]).encode()).hexdigest()[:32]


def _convert(stage: Stage) -> Any:
    """Planes u8 (n, 1, size, size) -> logits, features; normalisation is part of the model."""
    import torch

    from cxrbatch.engines.torch_engine import load_network

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = load_network(stage)
            self.mean = torch.tensor(stage.mean).view(1, -1, 1, 1) * 255
            self.std = torch.tensor(stage.std).view(1, -1, 1, 1) * 255

        def forward(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, features = self.net((planes.to(torch.float32) - self.mean) / self.std)
            return logits, features

    size = stage.plane.size
    example = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    with warnings.catch_warnings():  # tracing is deprecated in torch, and the way that OpenVINO reads a module
        warnings.simplefilter("ignore")
        model = openvino.convert_model(Normalised().eval(), example_input=example)
    model.reshape([-1, 1, size, size])
    return model
