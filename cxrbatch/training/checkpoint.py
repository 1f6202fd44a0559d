"""The state of a run after an epoch, in one safetensors file that is replaced atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cxrbatch.errors import Fatal
from cxrbatch.training.files import write_whole

__all__ = ["Progress", "load_checkpoint", "restore", "save_checkpoint"]


@dataclass(slots=True)
class Progress:
    """Everything about a run that is not a tensor."""

    recipe_sha256: str
    data_sha256: str
    pretrained: str = ""  # the first weights
    phases: list[int] = field(default_factory=list)  # epochs planned in each
    limit: int | None = None  # of a trial: it draws fewer images an epoch
    epoch: int = 0  # epochs done
    step: int = 0  # steps done
    best_loss: float = float("inf")
    best_epoch: int = -1
    rate_share: float = 1.0  # plateau: current factor of the learning rate
    waited: int = 0  # plateau: epochs without a better validation loss
    plateau_loss: float = float("inf")
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch

    def same_run(self, other: Progress) -> bool:
        """Whether both belong to the same run, so that training can continue from either."""
        mine, its = ((p.recipe_sha256, p.data_sha256, p.pretrained, p.phases, p.limit) for p in (self, other))
        return mine == its


def save_checkpoint(
    file: Path, progress: Progress, networks: dict[str, nn.Module], optimiser: torch.optim.Optimizer
) -> None:
    """Save the networks by name, the optimiser's moments, and `progress` as JSON in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    for name, net in networks.items():
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in net.state_dict().items()}
    for number, moments in optimiser.state_dict()["state"].items():
        tensors |= {
            f"optimiser.{number}.{key}": value.contiguous()
            for key, value in moments.items()
            if isinstance(value, Tensor)
        }
    told = {"progress": json.dumps(asdict(progress))}
    write_whole(file, save({key: value.clone() for key, value in tensors.items()}, told))


def load_checkpoint(file: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Read what `save_checkpoint` wrote. Raises Fatal if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            progress = Progress(**json.loads(tensors.metadata()["progress"]))
            return progress, {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Fatal(
            f"The checkpoint {file} can't be used ({type(error).__name__}); delete it or start elsewhere."
        ) from None


def restore(
    tensors: dict[str, Tensor], networks: dict[str, nn.Module], optimiser: torch.optim.Optimizer | None
) -> None:
    """Restore a checkpoint's tensors; with `optimiser` None, not its moments (a new phase begins)."""
    for name, net in networks.items():
        prefix = f"{name}."
        net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if optimiser is None:
        return
    state = optimiser.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, number, what = key.split(".")
            moments.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
