"""MixStyle mixes statistics between images, keeps patterns, and is removed after training."""

from __future__ import annotations

import torch

from cxrbatch.inference.engines.networks import build_network
from cxrbatch.training.mixstyle import exchange_statistics, mixstyle


def test_with_no_share_of_its_own_a_map_has_the_others_statistics_and_its_own_pattern() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 2, 5, 9]).view(4, 1, 1, 1) + torch.arange(4).view(4, 1, 1, 1)
    other = torch.tensor([1, 2, 3, 0])
    mixed = exchange_statistics(x, other, torch.zeros(4, 1, 1, 1))
    torch.testing.assert_close(mixed.mean((2, 3)), x[other].mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed.std((2, 3)), x[other].std((2, 3)), rtol=1e-3, atol=1e-3)
    pattern = torch.corrcoef(torch.stack([x[0, 0].ravel(), mixed[0, 0].ravel()]))[0, 1]
    assert pattern > 0.999
    torch.testing.assert_close(exchange_statistics(x, other, torch.ones(4, 1, 1, 1)), x)


def test_inside_images_are_mixed_and_outside_never() -> None:
    torch.manual_seed(0)
    net = build_network("mobilenet_v2", 1, 2).eval()
    x = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        plain = net(x)[0]
        with mixstyle(net, 1.0):
            mixed = net(x)[0]
        with mixstyle(net, 0.0):
            assert torch.equal(net(x)[0], plain)
        assert torch.equal(net(x)[0], plain)
    assert not torch.equal(plain, mixed)
