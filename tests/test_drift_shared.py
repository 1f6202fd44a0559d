"""Drift on real images: those of other hospitals alarm against the bundle's reference, those of its own do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines import open_engine
from cxrbatch.ops.drift_statistics import Rows, compare_reference
from cxrbatch.training.datasets import find_folders, split_images
from cxrbatch.training.reference import read_reference
from cxrbatch.training.scores import score_images

DATA = Path(__file__).parents[2] / "shared" / "data"
IMAGES, DAYS = 480, 12
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared is not there"),
]


@pytest.mark.parametrize(
    ("task", "alarms"),
    [("cascade", set()), ("siim", {"label_psi", "confidence_ks", "ood_score_ks", "grey_mean_ks"})],
)
def test_another_vendor_is_caught_within_500_images(task: str, alarms: set[str]) -> None:
    bundle = load_bundle("default")
    reference = read_reference(bundle.manifest)
    assert reference is not None
    (folder,) = find_folders(DATA, (task,))
    images = split_images(folder.images, "test")
    chosen = np.random.default_rng(0).permutation(len(images))[:IMAGES]
    scores = score_images(bundle, [images[i] for i in chosen], open_engine("auto", "cpu", bundle))
    window = Rows(
        day=np.repeat(np.arange(DAYS), IMAGES // DAYS),
        label=np.array([found.label for found in scores.assessments]),
        confidence=np.where(scores.passed, [found.confidence for found in scores.assessments], np.nan),
        ood_score=np.where(scores.passed, scores.ood, np.nan),
        grey_mean=np.where(scores.passed, scores.grey_mean, np.nan),
        gate_probability=scores.gate,
    )
    assert {found.name for found in compare_reference(window, reference, True) if found.alarming} == alarms
