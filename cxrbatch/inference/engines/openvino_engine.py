"""OpenVINO on CPU: several times faster than PyTorch there, and ready without importing it.

The network is built from the bundle's weights at first use (openvino_graph.py; other architectures through PyTorch,
which takes seconds once). The compiled network is cached under the hash of everything that it was made from and by,
with its own hash in front. Its inference precision is float32: by default it would be bfloat16 on processors that have
it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.engines.protocol import Network
from cxrbatch.inference.model_spec import ModelSpec

# None in sys.modules means "not installed". Importing openvino would also load its model converter (half a second).
_CONVERTER = "openvino.tools.ovc"
_shut = sys.modules.setdefault(_CONVERTER, None) is None  # type: ignore[arg-type]
import openvino  # noqa: E402

from cxrbatch.inference.engines.openvino_graph import mobilenet_v2  # noqa: E402

if _shut:
    del sys.modules[_CONVERTER]

__all__ = ["OpenVinoEngine"]

_PART = 4  # images: larger parts gain nothing on a CPU
_LARGEST_BATCH = 64
_CONVERSION = 4  # increase when the conversion changes, also its grids
_DIGEST = 32  # bytes of a SHA-256


class OpenVinoEngine:
    """One compiled network per stage. `threads` of 0 is one per core.

    Each thread runs a small part of the batch alone. Threads that share a part wait for each other in every layer,
    which costs a fifth more CPU, and much more while decoders use the cores.
    """

    name = "openvino"
    version = str(openvino.__version__).split("-")[0]
    device = "cpu"

    def __init__(self, threads: int = 0) -> None:
        self._core = openvino.Core()
        self._threads = threads or os.cpu_count() or 1
        self.batch_size = min(_LARGEST_BATCH, _PART * self._threads)
        self._loaded: dict[str, Network] = {}

    def load(self, stage: ModelSpec) -> Network:
        """The compiled stage. It is compiled once, although both the logit check and the run load it."""
        key = _key(stage)
        if key not in self._loaded:
            self._loaded[key] = self._compiled(stage)
        return self._loaded[key]

    def _compiled(self, stage: ModelSpec) -> Network:
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": self._threads,
            "INFERENCE_NUM_THREADS": self._threads,
        }
        compiled = self._cached(stage, settings)
        if compiled is None:
            compiled = self._core.compile_model(_convert(stage), "CPU", settings)
            _write(stage, compiled.export_model().getvalue())
        requests = [compiled.create_infer_request() for _ in range(self._threads)]

        def run(model_inputs: NDArray[np.uint8], /) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            parts = np.array_split(model_inputs[:, None], min(self._threads, math.ceil(len(model_inputs) / _PART)))
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

    def _cached(self, stage: ModelSpec, settings: dict[str, Any]) -> Any:
        """The compiled network in the cache; None where it is missing, damaged or refused."""
        try:
            data = _cache_file(stage).read_bytes()
            if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
                return None
            return self._core.import_model(io.BytesIO(data[_DIGEST:]), "CPU", settings)
        except (OSError, RuntimeError):
            return None


def _write(stage: ModelSpec, compiled: bytes) -> None:
    with suppress(OSError, RuntimeError):  # it cannot be cached: the next start compiles again
        file = _cache_file(stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            part = Path(folder) / file.name
            part.write_bytes(hashlib.sha256(compiled).digest() + compiled)
            os.replace(part, file)


def _cache_file(stage: ModelSpec) -> Path:
    """The compiled network in $XDG_CACHE_HOME/cxrbatch or ~/.cache/cxrbatch, which may be deleted at any time.

    Raises RuntimeError where the user has no home (an unknown user ID in a container).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cxrbatch" / f"{_key(stage)}.blob"


def _key(stage: ModelSpec) -> str:
    made_from = [stage.sha256, stage.architecture, stage.channels, stage.model_input.size, stage.mean, stage.std]
    made_by = [_CONVERSION, openvino.__version__, _processor_features()]
    return hashlib.sha256(json.dumps([*made_from, *made_by]).encode()).hexdigest()[:32]


@cache
def _processor_features() -> str:
    """What this kind of processor can do, as Linux says it; machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _convert(stage: ModelSpec) -> Any:
    """Model inputs u8 (n, 1, size, size) -> logits, features; normalisation is part of the model."""
    if stage.architecture in ("mobilenet_v2", "mobilenet_v2_int8"):
        return mobilenet_v2(stage)
    import torch
    from openvino.tools.ovc import convert_model

    from cxrbatch.inference.engines.torch_engine import load_network

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = load_network(stage)
            self.mean = torch.tensor(stage.mean).view(1, -1, 1, 1) * 255
            self.std = torch.tensor(stage.std).view(1, -1, 1, 1) * 255

        def forward(self, model_inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, features = self.net((model_inputs.to(torch.float32) - self.mean) / self.std)
            return logits, features

    size = stage.model_input.size
    example = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    with warnings.catch_warnings():  # torch deprecates tracing, but OpenVINO reads a module that way
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Normalised().eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
        model = convert_model(traced, example_input=example)
    model.reshape([-1, 1, size, size])
    return model
