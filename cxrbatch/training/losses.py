"""What a network is asked for and how far off it is, for a softmax over classes and for a gate's logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["guess_of", "loss_of", "mixed_loss", "mixup"]

_FRONTAL, _LATERAL = 1, 2  # labels of a gate; 0 is no chest image


def mixup(x: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """Mixup (Zhang et al. 2018) of half the batches with a shuffle of themselves.

    Returns the images, the row (n,) that each was mixed with, and the share (0..1) that stayed its own.
    """
    if not beta or torch.rand(()) < 0.5:
        return x, torch.arange(len(x)), 1.0
    share = float(torch.distributions.Beta(beta, beta).sample())
    other = torch.randperm(len(x))
    return share * x + (1 - share) * x[other], other, share


def mixed_loss(
    logits: Tensor, targets: Tensor, smoothing: Tensor, other: Tensor, share: float, *, binary: bool
) -> Tensor:
    """The mean loss of a batch after `mixup`; targets (n, outputs) and smoothing (n,) are of the unmixed images."""
    loss = loss_of(logits, targets, smoothing, binary=binary)
    if share == 1:
        return loss
    return share * loss + (1 - share) * loss_of(logits, targets[other], smoothing[other], binary=binary)


def loss_of(logits: Tensor, targets: Tensor, smoothing: Tensor, *, binary: bool) -> Tensor:
    """The mean loss of logits (n, outputs) against targets (n, outputs) of 0 and 1, smoothed by (n,) 0..1.

    Binary (a gate, findings): binary cross-entropy of each output. Otherwise minus the logarithm of the summed
    probability of the classes that the target allows (a partial label, Jin and Ghahramani 2002; with one class it is
    cross-entropy), and by `smoothing` cross-entropy against all classes alike. A target that allows no class asks for
    that alone.
    """
    if binary:
        s = smoothing[:, None]
        each = functional.binary_cross_entropy_with_logits(logits, targets * (1 - 2 * s) + s, reduction="none")
        return each.sum(1).mean()
    log_p = functional.log_softmax(logits, 1)
    allowed = targets > 0
    any_allowed = torch.logsumexp(log_p.masked_fill(~allowed, -1e9), 1)
    any_allowed = torch.where(allowed.any(1), any_allowed, torch.zeros_like(any_allowed))
    return (-(1 - smoothing) * any_allowed - smoothing * log_p.mean(1)).mean()


def guess_of(logits: Tensor, *, gate: bool) -> Tensor:
    """(n,) int64: the class of the highest logit. For a gate 0 no chest image, 1 a frontal one, 2 another view."""
    if not gate:
        return logits.argmax(1)
    chest = logits[:, 0] > 0
    if logits.shape[1] == 1:
        return chest.long()
    return torch.where(chest, torch.where(logits[:, 1] > 0, _FRONTAL, _LATERAL), 0)
