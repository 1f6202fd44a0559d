"""The decision rule."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL, REVIEW_FLAGS, Thresholds, assess, frontal_by_header
from cxrbatch.types import Decision

GATED = Thresholds(("NORMAL", "COVID19"), confidence=0.6, gate=0.5, gate_review_from=0.2)
UNGATED = Thresholds(("NORMAL", "COVID19"), confidence=0.6, gate=None)
SURE: dict[str, Any] = {"gate_probability": 0.5, "probabilities": (0.6, 0.4), "ood_score": 1.0, "quality_flags": ()}


@pytest.mark.parametrize(
    ("changes", "label", "decision", "reasons"),
    [
        ({}, "NORMAL", Decision.REPORTED, ()),  # at every threshold, and above none
        ({"probabilities": (0.41, 0.59)}, "COVID19", Decision.NEEDS_REVIEW, ("low_confidence",)),
        ({"ood_score": 1.01}, "NORMAL", Decision.NEEDS_REVIEW, ("unlike_training",)),
        ({"ood_score": None}, "NORMAL", Decision.REPORTED, ()),
        ({"gate_probability": 0.49}, NOT_CHEST, Decision.NEEDS_REVIEW, ("gate_unsure",)),
        ({"gate_probability": 0.2}, NOT_CHEST, Decision.NEEDS_REVIEW, ("gate_unsure",)),
        ({"gate_probability": 0.19}, NOT_CHEST, Decision.NOT_CHEST, ()),
        ({"gate_probability": 0.19, "probabilities": (), "ood_score": None}, NOT_CHEST, Decision.NOT_CHEST, ()),
    ],
)
def test_each_threshold(changes: dict[str, Any], label: str, decision: Decision, reasons: tuple[str, ...]) -> None:
    found = assess(GATED, **{**SURE, **changes})
    assert (found.label, found.decision, found.review_reasons) == (label, decision, reasons)


@pytest.mark.parametrize("flag", sorted(REVIEW_FLAGS))
@pytest.mark.parametrize("gate_probability", [0.9, 0.01])
def test_every_review_flag_counts_on_both_sides_of_the_gate(flag: str, gate_probability: float) -> None:
    found = assess(GATED, **{**SURE, "gate_probability": gate_probability, "quality_flags": ("colour", flag)})
    assert (found.decision, found.review_reasons) == (Decision.NEEDS_REVIEW, (flag,))


def test_what_may_be_none_of_the_classes_is_not_reported_as_normal() -> None:
    sure = {**SURE, "probabilities": (0.9, 0.1)}
    found = assess(GATED, **sure, other_probability=0.4)
    assert (found.label, found.confidence, found.review_reasons) == ("NORMAL", 0.9, ("possibly_abnormal",))
    assert found.abnormal_probability == pytest.approx(1 - 0.9 * 0.6)
    assert assess(GATED, **sure, other_probability=0.3).decision is Decision.REPORTED
    abnormal = assess(GATED, **{**sure, "probabilities": (0.1, 0.9)}, other_probability=0.9)
    assert (abnormal.label, abnormal.decision) == ("COVID19", Decision.REPORTED)
    unsure = assess(GATED, **{**sure, "probabilities": (0.55, 0.45)}, other_probability=0.9)
    assert unsure.review_reasons == ("low_confidence",)


def test_without_a_gate_everything_is_a_chest_image() -> None:
    found = assess(UNGATED, **{**SURE, "gate_probability": None})
    assert (found.label, found.confidence, found.decision) == ("NORMAL", 0.6, Decision.REPORTED)


def test_confidence_is_that_of_the_label() -> None:
    assert assess(GATED, **{**SURE, "gate_probability": 0.1}).confidence == pytest.approx(0.9)


VIEWS = Thresholds(("NORMAL", "COVID19"), confidence=0.6, gate=0.5, frontal=0.3)


@pytest.mark.parametrize(
    ("frontal", "view", "label", "confidence"),
    [
        (0.3, "", "NORMAL", 0.6),  # at the threshold
        (0.2, "", NOT_FRONTAL, 0.8),
        (0.2, "PA", "NORMAL", 0.6),  # the header decides where it says so
        (0.9, "LL", NOT_FRONTAL, 1.0),
        (None, "LL", NOT_FRONTAL, 1.0),  # a gate without the second output
        (None, "", "NORMAL", 0.6),
        (0.2, "SWIMMERS", NOT_FRONTAL, 0.8),  # a view that nobody knows decides nothing
    ],
)
def test_what_is_not_frontal_is_reviewed_and_has_no_disease(
    frontal: float | None, view: str, label: str, confidence: float
) -> None:
    found = assess(VIEWS, **{**SURE, "frontal_probability": frontal, "view_position": view})
    assert (found.label, found.confidence) == (label, pytest.approx(confidence))
    if label == NOT_FRONTAL:
        assert (found.decision, found.review_reasons) == (Decision.NEEDS_REVIEW, ("not_frontal",))
        assert found.label_set == () and found.abnormal_probability is None


def test_what_is_no_chest_stays_so_whatever_the_header_says_of_the_view() -> None:
    assert assess(VIEWS, **{**SURE, "gate_probability": 0.1, "view_position": "LL"}).label == NOT_CHEST


@pytest.mark.parametrize(
    ("view", "frontal"),
    [
        ("PA", True),
        ("ap", True),
        ("LLD", True),
        ("LL", False),
        ("L-LAT", False),
        ("RAO", False),
        ("", None),
        ("CC", None),
    ],
)
def test_view_position(view: str, frontal: bool | None) -> None:
    assert frontal_by_header(view) is frontal


def test_the_label_set_has_every_class_that_reaches_its_own_threshold() -> None:
    thresholds = Thresholds(("NORMAL", "COVID19", "PNEUMONIA"), 0.0, None, label_set=(0.5, 0.1, 0.3))

    def of(*probabilities: float) -> tuple[str, ...]:
        return assess(thresholds, **{**SURE, "gate_probability": None, "probabilities": probabilities}).label_set

    assert of(0.5, 0.1, 0.4) == ("NORMAL", "PNEUMONIA", "COVID19")
    assert of(0.45, 0.25, 0.29) == ("NORMAL", "COVID19")  # the label is always in it
    assert of(0.49, 0.09, 0.29) == ("NORMAL",)
    plain = Thresholds(("NORMAL", "COVID19"), 0.0, None)
    assert assess(plain, **{**SURE, "gate_probability": None}).label_set == ()


def test_the_abnormal_probability_is_what_is_left_of_normal() -> None:
    assert assess(GATED, **SURE).abnormal_probability == pytest.approx(0.4)
    lower = Thresholds(("Covid", "Normal"), 0.0, None)
    assert assess(lower, **{**SURE, "gate_probability": None}).abnormal_probability == pytest.approx(0.6)
    without = Thresholds(("Covid", "Pneumonia"), 0.0, None)
    assert assess(without, **{**SURE, "gate_probability": None}).abnormal_probability is None


def test_the_review_filters_by_every_reason_flag_and_label_that_a_decision_can_have() -> None:
    work_list = pytest.importorskip("cxrbatch.review.work_list")
    assert set(work_list.FLAGS) - {"colour"} == REVIEW_FLAGS
    assert set(work_list.NOT_DISEASE_LABELS) == {NOT_CHEST, NOT_FRONTAL}
    # The reasons are literals of `assess`: every other word of its source that a reason can be is in the list.
    said = re.findall(r'\[?\(?"([a-z_]+)"[\],]', inspect.getsource(assess))
    assert set(said) == set(work_list.REASONS)
