"""MobileNetV2 in whole numbers: every weight and every activation lies on a grid, so that each processor agrees.

Sums of whole numbers do not depend on the order, and OpenVINO runs such a network in 8-bit arithmetic: the logits are
the same on every CPU (docs/adr/0007-integer-networks.md). Here the grids are imposed on float32 tensors, with gradients
that pass straight through (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.mobilenetv2 import InvertedResidual

from cxrbatch.inference.engines.grids import BLOCK_STEP, COARSE_LEVELS, FINE_LEVELS, RELU6_LEVELS, WEIGHT_LEVELS

__all__ = ["on_grids"]


def on_grids(net: nn.Module) -> None:
    """Round the weights and activations of a MobileNetV2, in place; its tensors and their names stay as they are."""
    blocks = [module for module in net.modules() if isinstance(module, InvertedResidual)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = _Conv2d
        elif isinstance(module, nn.ReLU6):
            module.__class__ = _ReLU6
    for block in blocks:
        block.__class__ = _InvertedResidual
        depthwise, projection = block.conv[-3], block.conv[-2]
        depthwise[0].levels = projection.levels = FINE_LEVELS
        depthwise[2].levels = COARSE_LEVELS


class _Conv2d(nn.Conv2d):
    """The weights of each output channel are so many parts of the largest."""

    levels = WEIGHT_LEVELS

    def forward(self, x: Tensor) -> Tensor:
        step = (self.weight.detach().abs().amax((1, 2, 3), keepdim=True) / self.levels).clamp_min(1e-12)
        convolved: Tensor = self._conv_forward(x, _rounded(self.weight, step), self.bias)
        return convolved


class _ReLU6(nn.ReLU6):
    levels = RELU6_LEVELS

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(functional.relu6(x), 6 / self.levels)


class _InvertedResidual(InvertedResidual):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return _rounded(super().forward(x).clamp(-128 * BLOCK_STEP, 127 * BLOCK_STEP), BLOCK_STEP)


class _Round(torch.autograd.Function):
    """To whole steps; three times as fast as `torch.fake_quantize_per_tensor_affine`."""

    @staticmethod
    def forward(_context: Any, x: Tensor, step: Tensor | float) -> Tensor:
        return (x * (1 / step)).round_().mul_(step)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _rounded(x: Tensor, step: Tensor | float) -> Tensor:
    rounded: Tensor = _Round.apply(x, step)
    return rounded
