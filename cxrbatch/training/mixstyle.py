"""MixStyle (Zhou et al. 2021): images of a batch exchange the statistics of their early feature maps.

Mean and deviation of an early map depend on the machine, codec or hospital more than on the content of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cxrbatch.inference.engines.networks import FeatureNetwork

__all__ = ["exchange_statistics", "mixstyle"]

_AFTER_BLOCKS = (1, 3)  # the first blocks of full detail: 16 and 24 channels in MobileNetV2
_BETA = 0.2


def exchange_statistics(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Maps (n, c, h, w) whose mean and deviation per channel are mixed with those of image `other` (n,) of the batch.

    `share` (n, 1, 1, 1), 0..1, is the weight of the image's own statistics.
    """
    mean = x.mean((2, 3), keepdim=True).detach()
    std = (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    mixed_mean = share * mean + (1 - share) * mean[other]
    mixed_std = share * std + (1 - share) * std[other]
    return (x - mean) / std * mixed_std + mixed_mean


@contextmanager
def mixstyle(net: FeatureNetwork, chance: float) -> Iterator[None]:
    """Within the block, each forward pass mixes statistics with probability `chance` after each of the early blocks."""

    def hook(_block: nn.Module, _given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if torch.rand(()) >= chance:
            return out
        share = torch.distributions.Beta(_BETA, _BETA).sample(torch.Size((len(out), 1, 1, 1)))
        return exchange_statistics(out, torch.randperm(len(out)), share.to(out.device))

    blocks = [block for place, block in enumerate(net.features) if place in _AFTER_BLOCKS]  # type: ignore[arg-type, var-annotated]
    hooks = [block.register_forward_hook(hook) for block in blocks] if chance else []
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
