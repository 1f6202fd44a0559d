"""Engines run networks: torch (CUDA, CPU) and OpenVINO (CPU), behind the protocol of `protocol.py`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxrbatch.inference.bundle import Bundle
    from cxrbatch.inference.engines.protocol import InferenceEngine
    from cxrbatch.inference.model_spec import ModelSpec

__all__ = ["open_engine", "tolerance"]

_TOLERANCE = 0.02
_TOLERANCE_INT8 = 0.3  # between engines: a value between two steps may be rounded to either, and that spreads


def tolerance(stage: ModelSpec) -> float:
    """By how much the logits of the check model inputs may differ between engines and processors."""
    return _TOLERANCE_INT8 if stage.int8 else _TOLERANCE


def open_engine(name: str, device: str, bundle: Bundle | None = None) -> InferenceEngine:
    """The engine of that name ("auto", "torch", "openvino") on that device.

    "auto" is torch if a GPU is requested or available and the installed torch supports it, else OpenVINO. It is also
    torch if OpenVINO does not reproduce the logits that `bundle` records. Raises Fatal (exit 13) if the device is
    missing or cannot run that engine. Importing torch takes seconds: call this late.
    """
    if name == "openvino" or (name == "auto" and _cpu_only(device) and find_spec("openvino")):
        from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine

        if device not in ("auto", "cpu"):
            from cxrbatch.errors import ExitCode, Fatal

            raise Fatal(f"OpenVINO runs on the CPU here, not on {device}; use --engine torch.", ExitCode.DEVICE_MISSING)
        engine = OpenVinoEngine()
        if name == "openvino" or bundle is None or _agrees(engine, bundle):
            return engine
    from cxrbatch.inference.engines.torch_engine import TorchEngine

    return TorchEngine(device)


def _cpu_only(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    if not _gpus():
        return True
    from cxrbatch.inference.engines.torch_engine import (
        torch_devices,  # a GPU is worth the import time; torch may be a CPU build
    )

    return torch_devices("auto") == ["cpu"]


def _gpus() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))


def _agrees(engine: InferenceEngine, bundle: Bundle) -> bool:
    """Whether the engine can run this bundle and reproduces its recorded logits."""
    from cxrbatch.inference.engines.verify import largest_difference

    try:
        return all((largest_difference(stage, engine) or 0.0) <= tolerance(stage) for stage in bundle.stages)
    except Exception:  # whatever OpenVINO cannot do here, torch can
        return False
