"""What a network is asked for and how far off it is, for a softmax over classes and for a gate's single logit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["guess_of", "loss_of", "mixup", "target_of"]


def target_of(labels: Tensor, outputs: int) -> Tensor:
    """(n, outputs) float: one-hot; for a gate the class itself."""
    if outputs == 1:
        return labels.float()[:, None]
    return functional.one_hot(labels, outputs).float()


def mixup(x: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) of half the batches with a shuffle of themselves."""
    if not beta or torch.rand(()) < 0.5:
        return x, target
    share = float(torch.distributions.Beta(beta, beta).sample())
    other = torch.randperm(len(x))
    return share * x + (1 - share) * x[other], share * target + (1 - share) * target[other]


def loss_of(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (n, outputs) against smoothed targets (n, outputs); binary for a gate."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits, target * (1 - 2 * smoothing) + smoothing)
    return functional.cross_entropy(logits, target, label_smoothing=smoothing)


def guess_of(logits: Tensor) -> Tensor:
    """(n,) int64: the class of the highest logit; for a gate 1 above zero."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
