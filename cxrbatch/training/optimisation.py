"""The device, the optimiser and the moving average of a training run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.training.recipes import Optimiser

__all__ = ["make_optimiser", "move_average", "training_device"]


def training_device(wanted: str) -> torch.device:
    """The device of a run: "auto" takes a CUDA GPU where PyTorch sees one. Raises Fatal."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise Fatal(f"The device '{wanted}' is none of auto, cpu, cuda.", ExitCode.USAGE)
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise Fatal(
            "PyTorch sees no CUDA GPU here: leave --device out, or install a CUDA build of PyTorch.",
            ExitCode.DEVICE_MISSING,
        )
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def make_optimiser(wanted: Optimiser, net: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters that learn."""
    learning = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": wanted.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, wanted.learning_rate, wanted.momentum),
        "adam": lambda: torch.optim.Adam(groups, wanted.learning_rate),
        "adamw": lambda: torch.optim.AdamW(groups, wanted.learning_rate),
    }
    return makers[wanted.name]()


@torch.no_grad()
def move_average(averaged: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network; faster in the first steps, when it knows nothing yet."""
    if not decay:
        return
    share = 1 - min(decay, step / (step + 10))
    for slow, fast in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, share)
        else:
            slow.copy_(fast)
