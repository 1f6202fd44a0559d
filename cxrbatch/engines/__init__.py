"""Engines run networks: torch (CUDA, CPU) and OpenVINO (CPU), behind the one small protocol of `protocol.py`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxrbatch.bundles import Bundle
    from cxrbatch.engines.protocol import Engine

__all__ = ["TOLERANCE", "open_engine"]

#: Logits of the check planes may differ by this much between engines and processors.
TOLERANCE = 0.02


def open_engine(name: str, device: str, bundle: Bundle | None = None) -> Engine:
    """The engine of that name ("auto", "torch", "openvino") on that device.

    "auto" is OpenVINO where no GPU is wanted, there, or known to the installed torch, and torch otherwise, or where
    OpenVINO does not give the logits that `bundle` recorded when it was made. Raises Fatal (exit 13) when the device
    is not there, or cannot run that engine. Torch takes seconds to import: call this late.
    """
    if name == "openvino" or (name == "auto" and _cpu_only(device) and find_spec("openvino")):
        from cxrbatch.engines.openvino_engine import OpenVinoEngine

        if device not in ("auto", "cpu"):
            from cxrbatch.errors import ExitCode, Fatal

            raise Fatal(f"OpenVINO runs on the CPU here, not on {device}; use --engine torch.", ExitCode.DEVICE_MISSING)
        engine = OpenVinoEngine()
        if name == "openvino" or bundle is None or _agrees(engine, bundle):
            return engine
    from cxrbatch.engines.torch_engine import TorchEngine

    return TorchEngine(device)


def _cpu_only(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    if not _gpus():
        return True
    from cxrbatch.engines.torch_engine import torch_devices  # a GPU is worth seconds; torch may be its CPU build

    return torch_devices("auto") == ["cpu"]


def _gpus() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))


def _agrees(engine: Engine, bundle: Bundle) -> bool:
    """Whether the engine runs this bundle at all, and gives the logits that it recorded."""
    from cxrbatch.engines.verify import largest_difference

    try:
        return all((largest_difference(stage, engine) or 0.0) <= TOLERANCE for stage in bundle.stages)
    except Exception:  # whatever it is that OpenVINO cannot do here, torch can
        return False
