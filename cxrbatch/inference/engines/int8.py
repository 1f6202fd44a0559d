"""MobileNetV2 in whole numbers: every weight and every activation lies on a grid, so that each processor agrees.

Sums of whole numbers do not depend on the order, and OpenVINO runs such a network in 8-bit arithmetic: the logits are
the same on every CPU (docs/adr/0007-integer-networks.md). Here the grids are imposed on float32 tensors, with gradients
that pass straight through (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.mobilenetv2 import InvertedResidual

from cxrbatch.inference.engines.grids import BLOCK_STEP, RELU6_LEVELS, WEIGHT_LEVELS

__all__ = ["on_grids"]


def on_grids(net: nn.Module) -> None:
    """Round the weights and activations of a MobileNetV2, in place; its tensors and their names stay as they are."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.Conv2d: _Conv2d,
        nn.ReLU6: _ReLU6,
        InvertedResidual: _InvertedResidual,
    }
    for module in net.modules():
        module.__class__ = kinds.get(type(module), type(module))


class _Conv2d(nn.Conv2d):
    """The weights of each output channel are multiples of a 63rd of the largest."""

    def forward(self, x: Tensor) -> Tensor:
        step = (self.weight.detach().abs().amax((1, 2, 3)) / WEIGHT_LEVELS).clamp_min(1e-12)
        zero = torch.zeros_like(step, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.weight, step, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)
        convolved: Tensor = self._conv_forward(x, weight, self.bias)
        return convolved


class _ReLU6(nn.ReLU6):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(functional.relu6(x), 6 / RELU6_LEVELS, 0, 0, RELU6_LEVELS)


class _InvertedResidual(InvertedResidual):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(super().forward(x), BLOCK_STEP, 0, -128, 127)
