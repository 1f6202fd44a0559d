"""The architectures that a bundle may name, as torch modules that also return their features.

State dicts keep torchvision's key names, so that a torchvision checkpoint loads as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from cxrbatch.inference.engines.int8 import on_grids

__all__ = ["ARCHITECTURES", "FeatureNetwork", "build_network", "load_state", "read_state"]


class FeatureNetwork(nn.Module):
    """A convolutional classifier: float model inputs (n, channels, size, size) -> logits (n, k), features (n, d).

    Features are the globally pooled last feature map, before any fully connected layer.
    """

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.features(x).mean((2, 3))
        return self.classifier(pooled), pooled


def _mobilenet_v2(outputs: int) -> FeatureNetwork:
    net = models.mobilenet_v2(num_classes=outputs)
    return FeatureNetwork(net.features, net.classifier)


def _mobilenet_v2_int8(outputs: int) -> FeatureNetwork:
    net = _mobilenet_v2(outputs)
    on_grids(net)
    return net


def _mobilenet_v3_large(outputs: int) -> FeatureNetwork:
    net = models.mobilenet_v3_large(num_classes=outputs)
    return FeatureNetwork(net.features, net.classifier)


ARCHITECTURES: dict[str, Callable[[int], FeatureNetwork]] = {
    "mobilenet_v2": _mobilenet_v2,
    "mobilenet_v2_int8": _mobilenet_v2_int8,
    "mobilenet_v3_large": _mobilenet_v3_large,
}


def build_network(architecture: str, channels: int, outputs: int) -> FeatureNetwork:
    """An untrained network. `channels=1` makes the first convolution grey.

    Raises KeyError for an unknown architecture.
    """
    net = ARCHITECTURES[architecture](outputs)
    if channels != 3:
        first = next(m for m in net.features.modules() if isinstance(m, nn.Conv2d))
        first.weight = nn.Parameter(first.weight.new_zeros(first.out_channels, channels, *first.kernel_size))
        first.in_channels = channels
        if not first.weight.is_meta:
            nn.init.kaiming_normal_(first.weight, mode="fan_out")
    return net


def read_state(weights: Path) -> dict[str, Tensor]:
    """The tensors of a stage's network from its weights file, under torchvision's names."""
    tensors = load_file(weights).items()
    return {key.removeprefix("network."): tensor for key, tensor in tensors if key.startswith("network.")}


def load_state(net: FeatureNetwork, state: dict[str, Tensor]) -> None:
    """Fill `net` from a state dict of the same architecture (float16 is fine); strict.

    A three-channel first convolution is summed to one channel where the network is grey: exact for
    grey input under equal normalisation of the channels.
    """
    own = net.state_dict()
    fitted = {}
    for key, value in state.items():
        value = value.to(torch.float32) if value.is_floating_point() else value
        if key in own and value.ndim == 4 and value.shape[1] == 3 and own[key].shape[1] == 1:
            value = value.sum(1, keepdim=True)
        fitted[key] = value
    net.load_state_dict(fitted, assign=True)
