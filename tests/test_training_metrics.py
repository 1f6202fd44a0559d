"""Figures against scikit-learn and against cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from cxrbatch.inference.cascade import ood_scores, probabilities_of
from cxrbatch.inference.model_spec import Ood
from cxrbatch.training import metrics
from cxrbatch.training.calibrate import feature_statistics
from cxrbatch.training.calibrate_gate import gate_threshold
from cxrbatch.training.class_bias import balanced_bias
from cxrbatch.training.metrics import best_temperature
from cxrbatch.training.thresholds import review_thresholds


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 600)
    logits = rng.normal(0, 1, (600, 4))
    logits[np.arange(600), y] += 1.2
    return y, probabilities_of(logits, 1.0)


def test_tables_agree_with_scikit_learn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    y, p = scored
    guess = p.argmax(1)
    counts = metrics.confusion(y, guess, 4)
    np.testing.assert_array_equal(counts, reference.confusion_matrix(y, guess))
    assert metrics.balanced_accuracy(y, guess) == pytest.approx(reference.balanced_accuracy_score(y, guess))
    table = metrics.class_table(counts)
    precision, recall, f1, support = reference.precision_recall_fscore_support(y, guess)
    for c in range(4):
        assert table[c] == pytest.approx(
            {"precision": precision[c], "recall": recall[c], "f1": f1[c], "support": support[c]}
        )
        assert metrics.auc(y == c, p[:, c]) == pytest.approx(reference.roc_auc_score(y == c, p[:, c]))


def test_auc_counts_ties_half_and_is_nan_for_one_side() -> None:
    assert metrics.auc(np.array([True, False, True, False]), np.zeros(4)) == 0.5
    assert np.isnan(metrics.auc(np.array([True, True]), np.zeros(2)))


def test_calibration_error_of_known_cases() -> None:
    y = np.array([0] * 8 + [1] * 2)
    sure = np.tile([1.0, 0.0], (10, 1))
    assert metrics.calibration_error(y, sure) == pytest.approx(0.2)
    assert metrics.calibration_error(y, np.tile([0.8, 0.2], (10, 1))) == pytest.approx(0.0)


def test_coverage_keeps_the_most_confident_first() -> None:
    rows = metrics.coverage_curve(np.array([True] * 5 + [False] * 5), np.linspace(1, 0.1, 10), points=10)
    assert rows[0] == {"coverage": 0.1, "accuracy": 1.0} and rows[4]["accuracy"] == 1.0
    assert rows[-1] == {"coverage": 1.0, "accuracy": 0.5}


def test_bootstrap_draws_patients_not_images() -> None:
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 50)
    figure = lambda rows: {"accuracy": float(right[rows].mean())}  # noqa: E731
    by_image = metrics.bootstrap([str(i) for i in range(200)], figure)["accuracy"]
    by_patient = metrics.bootstrap([str(i // 50) for i in range(200)], figure)["accuracy"]
    assert by_image[1] - by_image[0] < 0.2 < 0.7 < by_patient[1] - by_patient[0]


def test_a_share_that_never_fails_is_not_certain() -> None:
    right, groups = np.ones(100), [str(i // 2) for i in range(100)]
    figure = lambda rows: {"right": float(right[rows].mean()), "wrong": float(1 - right[rows].mean())}  # noqa: E731
    rows = np.ones(100, bool)
    found = metrics.bootstrap(groups, figure, 20, of={"right": rows, "wrong": rows})
    exact = stats.binomtest(50, 50).proportion_ci(method="exact")
    assert found["right"] == pytest.approx([exact.low, 1.0]) and found["wrong"] == pytest.approx([0.0, 1 - exact.low])
    assert metrics.bootstrap(groups, figure, 20)["right"] == [1.0, 1.0]


def test_the_temperature_that_was_put_in_is_found() -> None:
    rng = np.random.default_rng(1)
    true = rng.normal(0, 1.5, (20_000, 3))
    y = np.array([rng.choice(3, p=row) for row in probabilities_of(true, 1.0)])
    assert best_temperature(true * 2.5, y) == pytest.approx(2.5, rel=0.06)


def test_review_thresholds_spend_the_budget() -> None:
    rng = np.random.default_rng(2)
    confidence, distance = rng.uniform(0.3, 1, 2000), rng.gamma(9, 1, 2000)
    threshold, far = review_thresholds(confidence, distance, 0.27, 0.05)
    assert ((confidence < threshold) | (distance > far)).mean() == pytest.approx(0.27, abs=0.005)
    assert (distance > far).mean() == pytest.approx(0.05, abs=0.002)


def test_features_of_another_world_are_far() -> None:
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 900)
    features = (rng.normal(0, 1, (900, 40)) + 12 * np.eye(40)[y]).astype(np.float32)
    whitening, means = feature_statistics(features, y, 3, directions=20)
    assert whitening.shape == (20, 40) and means.shape == (3, 20)

    def distance(x: np.ndarray) -> np.ndarray:
        return ood_scores(x.astype(np.float32), Ood(whitening, means, 1.0))

    inside = distance(features)
    for strength in (0.1, 4.0):  # an image that hardly excites the network is no nearer to what it knows
        outside = distance(rng.normal(0, strength, (100, 40)))
        assert np.quantile(inside, 0.95) < np.quantile(outside, 0.05)


def test_the_gate_threshold_lies_in_the_gap() -> None:
    probability = np.array([0.01, 0.02, 0.3, 0.7, 0.9, 0.99])
    threshold, unsure = gate_threshold(probability, probability > 0.5)
    assert 0.3 < threshold < 0.7 and 0 < unsure <= threshold


def test_a_bias_that_was_put_in_is_taken_out_again() -> None:
    rng = np.random.default_rng(4)
    y, folders = rng.integers(0, 3, 3000), rng.choice(["a", "b"], 3000)
    logits = rng.normal(0, 1, (3000, 3)) + 2 * np.eye(3)[y] + [1.0, 0, -1.0]
    right = np.eye(3, dtype=bool)[y]
    bias = balanced_bias(logits, right, folders.tolist(), y.astype(str).tolist())
    assert bias == pytest.approx([-1.0, 0, 1.0], abs=0.3)


def test_a_label_of_several_classes_and_a_folder_of_one_label_say_nothing() -> None:
    y = np.repeat([0, 1], 20)
    right = np.eye(3, dtype=bool)[y]
    logits = np.repeat([[1.9, 0.6, 0.0], [1.0, 0.8, 0.0]], 20, axis=0)
    folders, labels = ["a"] * 40, y.astype(str).tolist()
    bias = balanced_bias(logits, right, folders, labels)
    assert bias[1] - bias[0] == pytest.approx(0.25)
    alone = balanced_bias(logits, right, ["a"] * 20 + ["b"] * 20, labels)
    right[20:, 2] = True
    assert alone.tolist() == balanced_bias(logits, right, folders, labels).tolist() == [0, 0, 0]
