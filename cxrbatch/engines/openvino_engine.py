"""OpenVINO on CPU: several times faster than PyTorch there, and ready without importing it.

The network is made from the bundle's weights at first use (openvino_graph.py; other architectures by way of PyTorch,
seconds, once) and kept in the cache folder under the hash of everything that it was made from. Numbers are float32
throughout: on processors with bfloat16, OpenVINO would use it unasked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import Stage
from cxrbatch.engines.protocol import Network

# A None there means "not installed": importing openvino would load its converter for foreign models too, half a second.
_CONVERTER = "openvino.tools.ovc"
_shut = sys.modules.setdefault(_CONVERTER, None) is None  # type: ignore[arg-type]
import openvino  # noqa: E402

from cxrbatch.engines.openvino_graph import mobilenet_v2  # noqa: E402

if _shut:
    del sys.modules[_CONVERTER]

__all__ = ["OpenVinoEngine", "cache_folder"]

_PART = 4  # images: larger parts gain nothing on a CPU
_LARGEST_BATCH = 64
_CONVERSION = 2  # raise when what is converted changes


def cache_folder() -> Path:
    """Where converted networks are kept: $XDG_CACHE_HOME/cxrbatch or ~/.cache/cxrbatch. May be deleted any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrbatch"


class OpenVinoEngine:
    """One compiled network a stage. `threads`: 0 is one a core.

    Each thread runs a small part of the batch by itself. Two threads that share one part wait for one another in every
    layer, which costs a fifth more CPU, and much more where decoders take the cores away in between.
    """

    name = "openvino"
    version = str(openvino.__version__).split("-")[0]
    device = "cpu"

    def __init__(self, threads: int = 0) -> None:
        self._core = openvino.Core()
        self._threads = threads or os.cpu_count() or 1
        self.batch_size = min(_LARGEST_BATCH, _PART * self._threads)
        self._loaded: dict[str, Network] = {}

    def load(self, stage: Stage) -> Network:
        """The stage, compiled once however often it is asked for (it is: by the check of its logits, and to run)."""
        key = _key(stage)
        if key not in self._loaded:
            self._loaded[key] = self._compiled(stage)
        return self._loaded[key]

    def _compiled(self, stage: Stage) -> Network:
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": self._threads,
            "INFERENCE_NUM_THREADS": self._threads,
        }
        compiled = self._core.compile_model(self._model(stage), "CPU", settings)
        requests = [compiled.create_infer_request() for _ in range(self._threads)]

        def run(planes: NDArray[np.uint8], /) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            parts = np.array_split(planes[:, None], min(self._threads, math.ceil(len(planes) / _PART)))
            busy = []
            try:
                for request, part in zip(requests, parts, strict=False):
                    request.start_async({0: np.ascontiguousarray(part)})
                    busy.append(request)
            finally:
                for request in busy:
                    request.wait()
            logits, features = (np.concatenate([r.get_output_tensor(i).data for r in busy]) for i in (0, 1))
            return logits, features

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
    if stage.architecture == "mobilenet_v2":
        return mobilenet_v2(stage)
    import torch
    from openvino.tools.ovc import convert_model

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
        traced = torch.jit.trace(Normalised().eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
        model = convert_model(traced, example_input=example)
    model.reshape([-1, 1, size, size])
    return model
