"""The cascade's predictions from given numbers: the engine is a fake, the rules are real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxrbatch import unexpected
from cxrbatch.errors import Fatal, ReasonCode, Rejected, Retry
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.cascade import Cascade, ood_scores
from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.inference.model_spec import ModelSpec, Ood, OtherOutput
from cxrbatch.types import Decision, DecodedImage, ImageFacts, Prediction
from factories import make_bundle

GATE, DISEASE = "gate", "disease"


class FakeEngine:
    """Each image's first pixels are its logits: gate from column 0, disease from columns 1-4 (minus 128)."""

    name, version, device = "fake", "0", "cpu"

    def __init__(self, fail_on: int | None = None) -> None:
        self.batches: list[tuple[str, int]] = []
        self.fail_on = fail_on

    def load(self, stage: ModelSpec) -> object:
        def run(model_inputs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            self.batches.append((stage.role, len(model_inputs)))
            row = model_inputs[:, 0, :].astype(np.float32) - 128
            if self.fail_on is not None and (row[:, 9] == self.fail_on).any():
                raise RuntimeError("device lost")
            row[row == 127] = np.nan  # a pixel of 255
            return (row[:, :1] if stage.role == GATE else row[:, 1:5]), row[:, 5:7]

        return run


def image(*logits: int, flags: Sequence[str] = (), features: tuple[int, int] = (0, 0), tag: int = 0) -> DecodedImage:
    model_input = np.full((64, 64), 128, np.uint8)
    model_input[0, : len(logits)] = np.array(logits) + 128
    model_input[0, 5:7] = np.array(features) + 128
    model_input[0, 9] = tag + 128
    spec = SPEC
    return DecodedImage(
        f"{hash(logits)}", ImageFacts("png", 64, 64, 8, quality_flags=tuple(flags)), {spec: model_input}
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    global SPEC
    made = load_bundle(make_bundle(tmp_path_factory.mktemp("bundle")))
    SPEC = made.disease.model_input
    ood = Ood(np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32), 10.0, unit=False)
    return replace(made, stages=(made.stages[0], replace(made.stages[1], ood=ood, threshold=0.6)))


def scored(bundle: Bundle, *images: DecodedImage, engine: FakeEngine | None = None) -> list[Prediction | Rejected]:
    return Cascade(bundle, engine or FakeEngine()).score(images)  # type: ignore[arg-type]


def one(bundle: Bundle, image: DecodedImage) -> Prediction:
    (prediction,) = scored(bundle, image)
    assert isinstance(prediction, Prediction)
    return prediction


def test_a_clear_image_is_reported_with_every_number(bundle: Bundle) -> None:
    prediction = one(bundle, image(9, 0, 8, 0, 0))
    assert (prediction.label, prediction.decision, prediction.is_chest) == ("COVID19", Decision.REPORTED, True)
    assert prediction.confidence == pytest.approx(prediction.probabilities["COVID19"]) and prediction.confidence > 0.99
    assert prediction.logits == {"NORMAL": 0, "COVID19": 8, "PNEUMONIA": 0, "TUBERCULOSIS": 0}
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_the_disease_model_runs_only_on_what_passed(bundle: Bundle) -> None:
    engine = FakeEngine()
    predictions = scored(bundle, image(-9), image(9, 9), image(-9), image(9, 0, 0, 9), engine=engine)
    assert [v.label for v in predictions if isinstance(v, Prediction)] == [NOT_CHEST, "NORMAL", NOT_CHEST, "PNEUMONIA"]
    assert engine.batches == [(GATE, 4), (DISEASE, 2)]
    not_chest = predictions[0]
    assert isinstance(not_chest, Prediction)
    assert (not_chest.decision, not_chest.is_chest, not_chest.logits) == (Decision.NOT_CHEST, False, {})
    assert not_chest.confidence == pytest.approx(1 - not_chest.gate_probability)  # type: ignore[operator]


def test_nothing_passes_and_the_disease_model_stays_silent(bundle: Bundle) -> None:
    engine = FakeEngine()
    scored(bundle, image(-9), image(-9), engine=engine)
    assert engine.batches == [(GATE, 2)]


def test_a_batch_of_nothing_but_rejected_files_scores_nothing(bundle: Bundle) -> None:
    assert scored(bundle) == []


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (image, ("low_confidence",)),
        (lambda *a: image(*a, features=(9, 9)), ("low_confidence", "unlike_training")),
        (lambda *a: image(*a, flags=["tiny", "colour"]), ("low_confidence", "tiny")),
    ],
)
def test_what_the_model_does_not_know_goes_to_review(bundle: Bundle, make: object, reasons: tuple[str, ...]) -> None:
    prediction = one(bundle, make(9, 1, 1, 1, 1))  # type: ignore[operator]
    assert (prediction.decision, prediction.review_reasons) == (Decision.NEEDS_REVIEW, reasons)


def test_a_degraded_image_that_the_gate_rejects_goes_to_review(bundle: Bundle) -> None:
    prediction = one(bundle, image(-9, flags=["saturated", "rotated", "extreme_aspect"]))
    assert (prediction.label, prediction.is_chest) == (NOT_CHEST, False)
    assert (prediction.decision, prediction.review_reasons) == (
        Decision.NEEDS_REVIEW,
        ("saturated", "extreme_aspect"),
    )


def test_flags_that_change_nothing_leave_a_rejected_image_alone(bundle: Bundle) -> None:
    prediction = one(bundle, image(-9, flags=["rotated", "colour", "alpha"]))
    assert (prediction.decision, prediction.review_reasons) == (Decision.NOT_CHEST, ())


@pytest.mark.parametrize("gate", [9, -9])
def test_frames_that_were_not_scored_are_a_reason_to_look(bundle: Bundle, gate: int) -> None:
    prediction = one(bundle, image(gate, 9, flags=["multi_frame"]))
    assert (prediction.decision, prediction.review_reasons) == (Decision.NEEDS_REVIEW, ("multi_frame",))


def test_a_gate_that_is_unsure_goes_to_review(bundle: Bundle) -> None:
    gate = replace(bundle.stages[0], manifest={**bundle.stages[0].manifest, "review_from": 0.1})
    unsure = replace(bundle, stages=(gate, bundle.stages[1]))
    prediction = one(unsure, image(-1, flags=["tiny"]))
    assert (prediction.label, prediction.review_reasons) == (NOT_CHEST, ("gate_unsure", "tiny"))


def test_temperature_softens_confidence_and_not_logits(bundle: Bundle) -> None:
    soft = replace(bundle, stages=(bundle.stages[0], replace(bundle.stages[1], temperature=4.0)))
    hard, softened = one(bundle, image(9, 0, 4)), one(soft, image(9, 0, 4))
    assert softened.confidence < hard.confidence and softened.logits == hard.logits


@pytest.mark.parametrize("pixels", [(127,), (9, 0, 127)])
def test_numbers_that_are_not_finite_are_a_reason_and_never_a_label(bundle: Bundle, pixels: tuple[int, ...]) -> None:
    bad, good = scored(bundle, image(*pixels), image(9, 9))
    assert isinstance(bad, Rejected) and bad.reason_code is ReasonCode.NON_FINITE_OUTPUT
    assert isinstance(good, Prediction) and good.label == "NORMAL"


def test_an_engine_that_fails_on_one_image_costs_that_image_and_it_is_tried_again_later(bundle: Bundle) -> None:
    good, bad = scored(bundle, image(9, 9), image(9, 9, tag=5), engine=FakeEngine(fail_on=5))
    assert isinstance(good, Prediction)
    assert isinstance(bad, Retry) and bad.reason_code is ReasonCode.ENGINE_FAILED


def test_an_engine_that_fails_leaves_a_log_line_without_its_words(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unexpected, "_counts", Counter())  # only the 1st, 10th, ... of a kind is logged
    scored(bundle, image(9, 9, tag=7), engine=FakeEngine(fail_on=7))
    assert "RuntimeError" in caplog.text and "test_cascade.py:" in caplog.text
    assert "device lost" not in caplog.text


def test_what_ends_the_engine_ends_the_scan(bundle: Bundle) -> None:
    class Lost(FakeEngine):
        def load(self, stage: ModelSpec) -> object:
            def run(_: object) -> object:
                raise Fatal("The GPU is lost.")

            return run

    with pytest.raises(Fatal):
        scored(bundle, image(9), image(9), engine=Lost())


def test_a_cascade_without_a_gate(tmp_path: Path) -> None:
    prediction = one(load_bundle(make_bundle(tmp_path / "b", with_gate=False)), image(0, 0, 0, 0, 9))
    assert (prediction.label, prediction.is_chest, prediction.gate_probability) == ("TUBERCULOSIS", None, None)


def test_the_ood_score_is_the_distance_to_the_nearest_mean() -> None:
    ood = Ood(np.array([[2, 0]], np.float32), np.array([[0], [10]], np.float32), 4.0, unit=False)
    np.testing.assert_allclose(ood_scores(np.array([[1, 7], [4, 0]], np.float32), ood), [0.5, 0.5])


def test_the_ood_score_knows_a_direction_and_not_a_length() -> None:
    ood = Ood(np.array([[2, 0]], np.float32), np.array([[0], [2]], np.float32), 0.5)
    found = ood_scores(np.array([[3, 4], [30, 40], [5, 0], [0, 0]], np.float32), ood)
    np.testing.assert_allclose(found, [1.6, 1.6, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("frontal_bias", "view", "label"),
    [(-10.0, "", NOT_FRONTAL), (10.0, "", "a class"), (-10.0, "PA", "a class"), (10.0, "LL", NOT_FRONTAL)],
)
def test_a_gate_with_a_third_answer(tmp_path: Path, frontal_bias: float, view: str, label: str) -> None:
    made = load_bundle(make_bundle(tmp_path / "b", frontal_bias=frontal_bias))
    model_inputs = {made.disease.model_input: np.zeros((64, 64), np.uint8)}
    facts = ImageFacts("dicom", 64, 64, 8, view_position=view)
    (found,) = Cascade(made, TorchEngine("cpu")).score([DecodedImage("0", facts, model_inputs)])
    assert isinstance(found, Prediction) and found.is_chest
    if label == NOT_FRONTAL:
        assert (found.label, found.decision) == (NOT_FRONTAL, Decision.NEEDS_REVIEW)
        assert found.review_reasons == ("not_frontal",) and not found.probabilities
    else:
        assert found.label in made.disease.classes and found.abnormal_probability is not None
        assert found.abnormal_probability == pytest.approx(1 - found.probabilities["NORMAL"])


def test_a_second_answer_that_is_not_finite_is_never_a_label(bundle: Bundle) -> None:
    two = replace(bundle, stages=(replace(bundle.stages[0], frontal_threshold=0.5), bundle.disease))

    class TwoAnswers(FakeEngine):
        def load(self, stage: ModelSpec) -> object:
            run = super().load(stage)
            extra = np.array([[np.nan]], np.float32)
            return lambda x: (np.hstack([run(x)[0], extra]), run(x)[1]) if stage.role == GATE else run(x)  # type: ignore[operator]

    (found,) = Cascade(two, TwoAnswers()).score([image(9, 9, 0, 0, 0)])
    assert isinstance(found, Rejected) and found.reason_code is ReasonCode.NON_FINITE_OUTPUT


def test_an_image_after_one_whose_second_answer_is_not_finite_keeps_its_own_scores(bundle: Bundle) -> None:
    """The header of the first says that it is frontal, so the disease model has seen it."""
    two = replace(bundle, stages=(replace(bundle.stages[0], frontal_threshold=0.5), bundle.disease))

    class TwoAnswers(FakeEngine):
        def load(self, stage: ModelSpec) -> object:
            run = super().load(stage)

            def both(x: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
                logits, features = run(x)  # type: ignore[operator]
                frontal = np.where(x[:, :1, 9] == 129, np.nan, 9).astype(np.float32)  # NaN for tag 1
                return (np.hstack([logits, frontal]) if stage.role == GATE else logits), features

            return both

    images = [image(9, 9, 0, 0, 0, tag=1), image(9, 0, 0, 0, 9)]
    images = [replace(one, facts=replace(one.facts, view_position="PA")) for one in images]
    bad, found = Cascade(two, TwoAnswers()).score(images)
    assert isinstance(bad, Rejected) and bad.reason_code is ReasonCode.NON_FINITE_OUTPUT
    assert isinstance(found, Prediction) and found.label == "TUBERCULOSIS"


def test_what_may_be_none_of_the_classes_is_for_review_and_never_silently_nothing(bundle: Bundle) -> None:
    """Also where nothing else looks at the features: a bundle without a score for what is unlike the training."""
    other = OtherOutput(np.array([1, 0], np.float32), -8.0)
    knowing = replace(bundle, stages=(bundle.stages[0], replace(bundle.stages[1], ood=None, other=other)))
    assert one(knowing, image(9, 9, 0, 0, 0)).review_reasons == ()
    asked = one(knowing, image(9, 9, 0, 0, 0, features=(20, 0)))
    assert (asked.label, asked.review_reasons) == ("NORMAL", ("possibly_abnormal",))
    (bad,) = scored(knowing, image(9, 9, 0, 0, 0, features=(127, 0)))
    assert isinstance(bad, Rejected) and bad.reason_code is ReasonCode.NON_FINITE_OUTPUT
