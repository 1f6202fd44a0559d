"""Label sets: the coverage that is stated is the coverage that is reached."""

from __future__ import annotations

import numpy as np
import pytest

from cxrbatch.training.conformal import class_thresholds, operating_point, source_weights


def _drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, 3) and classes (n,) of a mediocre classifier that is worse for class 2."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    logits = rng.standard_normal((n, 3)) + np.array([2.5, 2.5, 0.8])[y][:, None] * np.eye(3)[y]
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), y


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_every_class_is_covered_on_images_that_were_not_calibrated_on(coverage: float) -> None:
    p, y = _drawn(4000, 1)
    thresholds = class_thresholds(p, y, np.ones(len(y)), coverage)
    new, right = _drawn(20_000, 2)
    covered = (new >= thresholds)[np.arange(len(right)), right]
    for c in range(3):
        assert covered[right == c].mean() == pytest.approx(coverage, abs=0.02)
    assert (new >= thresholds).sum(1).mean() < 3  # and not by naming every class


def test_the_finite_sample_quantile() -> None:
    p = np.stack([np.linspace(0.1, 1.0, 10), 1 - np.linspace(0.1, 1.0, 10)], 1)
    y = np.zeros(10, np.int64)
    ones = np.ones(10)
    assert class_thresholds(p, y, ones, 0.9)[0] == pytest.approx(0.1)  # floor(0.1 * 11) = 1st smallest
    assert class_thresholds(p, y, ones, 0.8)[0] == pytest.approx(0.2)  # floor(0.2 * 11) = 2nd
    assert class_thresholds(p, y, ones, 0.95)[0] == 0.0  # too few images to promise it: always named
    assert class_thresholds(p, y, ones, 0.9)[1] == 0.0  # a class without an image


def test_a_small_source_counts_as_much_as_a_large_one() -> None:
    y = np.zeros(110, np.int64)
    sources = ["home"] * 100 + ["elsewhere"] * 10
    p = np.concatenate([np.full(100, 0.9), np.full(10, 0.3)])[:, None]
    p = np.concatenate([p, 1 - p], 1)
    weights = source_weights(y, sources)
    assert weights[:100].sum() == pytest.approx(weights[100:].sum())
    assert class_thresholds(p, y, np.ones(110), 0.85)[0] == 0.9
    assert class_thresholds(p, y, weights, 0.85)[0] == 0.3


def test_operating_point_finds_the_share_that_was_asked_for() -> None:
    score = np.arange(10) / 10
    positive = score >= 0.5
    assert operating_point(score, positive, np.ones(10), 1.0) == (0.5, 1.0)
    assert operating_point(score, positive, np.ones(10), 0.4) == (0.8, 1.0)
    threshold, specificity = operating_point(score, ~positive, np.ones(10), 1.0)
    assert (threshold, specificity) == (0.0, 0.0)
