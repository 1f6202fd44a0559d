"""What is asked of a network: classes, one of several classes, none of them, and the two answers of a gate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cxrbatch.training.losses import guess_of, loss_of, mixed_loss


def _descend(target: list[float], smoothing: float, start: list[float]) -> torch.Tensor:
    """Where gradient descent on one image's logits ends, as probabilities."""
    logits = torch.tensor([start], requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.1)
    for _ in range(400):
        optimiser.zero_grad()
        loss_of(logits, torch.tensor([target]), torch.tensor([smoothing]), binary=False).backward()
        optimiser.step()
    return logits.detach().softmax(1)[0]


def test_a_whole_label_is_cross_entropy() -> None:
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    for smoothing in (0.0, 0.1):
        ours = loss_of(logits, functional.one_hot(y, 4).float(), torch.full((5,), smoothing), binary=False)
        torch.testing.assert_close(ours, functional.cross_entropy(logits, y, label_smoothing=smoothing))


def test_a_partial_label_leaves_open_which_of_its_classes_it_is() -> None:
    favours_second = _descend([0, 1, 1, 0], 0.0, [1.0, 2.0, 0.0, 1.0])
    favours_third = _descend([0, 1, 1, 0], 0.0, [1.0, 0.0, 2.0, 1.0])
    for found in (favours_second, favours_third):
        assert found[1] + found[2] > 0.98
    assert favours_second[1] > 0.8 and favours_third[2] > 0.8


def test_none_of_the_classes_asks_for_all_alike() -> None:
    assert _descend([0, 0, 0, 0], 1.0, [3.0, 0.0, 0.0, 0.0]).tolist() == pytest.approx([0.25] * 4, abs=0.01)


def test_a_mixed_batch_is_the_mean_of_both_losses() -> None:
    logits, targets, smoothing = torch.randn(3, 4), torch.eye(4)[:3], torch.tensor([0.0, 0.1, 0.5])
    other = torch.tensor([2, 0, 1])
    found = mixed_loss(logits, targets, smoothing, other, 0.7, binary=False)
    own, mixed = (loss_of(logits, targets[i], smoothing[i], binary=False) for i in (torch.arange(3), other))
    torch.testing.assert_close(found, 0.7 * own + 0.3 * mixed)


def test_the_answers_of_a_gate() -> None:
    two = torch.tensor([[-1.0, 5.0], [1.0, 1.0], [1.0, -1.0]])
    assert guess_of(two, gate=True).tolist() == [0, 1, 2]
    assert guess_of(two[:, :1], gate=True).tolist() == [0, 1, 1]
    right = loss_of(two * 9, torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), torch.zeros(3), binary=True)
    assert right < 0.01
