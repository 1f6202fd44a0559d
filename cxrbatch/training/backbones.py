"""The initial weights of a network: a download of torchvision's, a bundle, a file, or random."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines.networks import FeatureNetwork, build_network, load_state

__all__ = ["freeze", "join_other", "split_other", "start_network"]

_DOWNLOADS = {
    "mobilenet_v2": models.mobilenet_v2,
    "mobilenet_v2_int8": models.mobilenet_v2,
    "mobilenet_v3_large": models.mobilenet_v3_large,
}
_MOMENTUM = 0.1  # of batch norm; torch's own default


def start_network(architecture: str, channels: int, outputs: int, pretrained: str) -> FeatureNetwork:
    """A network with a new last layer of `outputs`, on the backbone that `pretrained` names.

    `pretrained` is "none"; "imagenet" (a download of torchvision's; needs a network); "bundle:NAME", the disease
    stage of a bundle; or a safetensors file with torchvision's key names, with or without the prefix `network.`
    of a bundle. Raises Fatal.
    """
    net = build_network(architecture, channels, outputs)
    if pretrained != "imagenet":
        _hasten_batch_norm(net)
    if pretrained == "none":
        return net
    if pretrained == "imagenet":
        state = _download(architecture)
    elif pretrained.startswith("bundle:"):
        state = _file(load_bundle(pretrained.removeprefix("bundle:")).disease.weights)
    else:
        state = _file(Path(pretrained))
    own = net.state_dict()
    head = _head(own)
    state = {key: own.get(key, value) if key.startswith(head) else value for key, value in state.items()}
    try:
        load_state(net, state)
    except RuntimeError:
        raise Fatal(f"The pretrained weights '{pretrained}' are not those of a {architecture}.") from None
    torch.nn.init.normal_(net.state_dict()[head + "weight"], 0, 0.01)
    torch.nn.init.zeros_(net.state_dict()[head + "bias"])
    return net


def split_other(state: dict[str, Tensor], classes: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The state without the last layer's row after the `classes` first ones, and that row: weight (d,), bias (1,)."""
    head = _head(state)
    weight, bias = state[head + "weight"], state[head + "bias"]
    kept = state | {head + "weight": weight[:classes], head + "bias": bias[:classes]}
    return kept, (weight[classes], bias[classes:])


def join_other(state: dict[str, Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """What `split_other` took apart."""
    head = _head(state)
    rows = {"weight": weight[None], "bias": bias}
    return state | {
        head + name: torch.cat([state[head + name], row.to(state[head + name])]) for name, row in rows.items()
    }


def _head(state: dict[str, Tensor]) -> str:
    """The prefix of the last layer's keys."""
    last = max((k for k in state if k.startswith("classifier.")), key=lambda k: int(k.split(".")[1]))
    return last.rpartition(".")[0] + "."


def _hasten_batch_norm(net: nn.Module) -> None:
    """Let the running statistics adapt within tens of steps instead of hundreds.

    torchvision's MobileNetV3 updates them by 1 % per step. After a short run from random weights, or from weights for
    another input size, they would still be near their initial values, and in eval mode every image would get the same
    output.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum or 0.0, _MOMENTUM)


def freeze(net: FeatureNetwork, blocks: int) -> None:
    """Freeze the first `blocks` feature blocks (-1: all): weights and batch-norm statistics. The rest is trained.

    Call it again after `net.train()`, which unfreezes the statistics.
    """
    blocks = len(net.features) if blocks < 0 else blocks  # type: ignore[arg-type]
    for place, block in enumerate(net.features):  # type: ignore[arg-type, var-annotated]
        still = place < blocks
        for weight in block.parameters():
            weight.requires_grad_(not still)
        if still:
            block.eval()


def _download(architecture: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = _DOWNLOADS[architecture](weights="IMAGENET1K_V1").state_dict()
    except OSError as error:
        raise Fatal(
            f"The ImageNet weights of {architecture} can't be downloaded ({type(error).__name__}); give "
            "--pretrained a safetensors file, bundle:default, or none."
        ) from None
    return state


def _file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise Fatal(f"The pretrained weights {path} do not exist.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise Fatal(f"{path} is not a safetensors file ({error}).") from None
    prefixed = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    return prefixed or state
