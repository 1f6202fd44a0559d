"""What the cascade makes of numbers: fakes give the numbers, the rules are the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxrbatch.bundles import Bundle, Ood, Stage, load_bundle
from cxrbatch.cascade import NOT_CHEST, Cascade, ood_scores
from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.nouns import Decision, DecodedImage, ImageFacts, Verdict
from making import make_bundle

GATE, DISEASE = "gate", "disease"


class FakeEngine:
    """Each image's first pixels are its logits: gate from column 0, disease from columns 1-4 (minus 128)."""

    name, version, device = "fake", "0", "cpu"

    def __init__(self, fail_on: int | None = None) -> None:
        self.batches: list[tuple[str, int]] = []
        self.fail_on = fail_on

    def load(self, stage: Stage) -> object:
        def run(planes: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            self.batches.append((stage.role, len(planes)))
            row = planes[:, 0, :].astype(np.float32) - 128
            if self.fail_on is not None and (row[:, 9] == self.fail_on).any():
                raise RuntimeError("device lost")
            row[row == 127] = np.nan  # a pixel of 255
            return (row[:, :1] if stage.role == GATE else row[:, 1:5]), row[:, 5:7]

        return run


def image(*logits: int, flags: Sequence[str] = (), features: tuple[int, int] = (0, 0), tag: int = 0) -> DecodedImage:
    plane = np.full((64, 64), 128, np.uint8)
    plane[0, : len(logits)] = np.array(logits) + 128
    plane[0, 5:7] = np.array(features) + 128
    plane[0, 9] = tag + 128
    spec = SPEC
    return DecodedImage(f"{hash(logits)}", ImageFacts("png", 64, 64, 8, quality_flags=tuple(flags)), {spec: plane})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    global SPEC
    made = load_bundle(make_bundle(tmp_path_factory.mktemp("bundle")))
    SPEC = made.disease.plane
    ood = Ood(np.eye(2, dtype=np.float32), np.zeros((1, 2), np.float32), 10.0, unit=False)
    return replace(made, stages=(made.stages[0], replace(made.stages[1], ood=ood, threshold=0.6)))


def scored(bundle: Bundle, *images: DecodedImage, engine: FakeEngine | None = None) -> list[Verdict | Rejected]:
    return Cascade(bundle, engine or FakeEngine()).score(images)  # type: ignore[arg-type]


def one(bundle: Bundle, image: DecodedImage) -> Verdict:
    (verdict,) = scored(bundle, image)
    assert isinstance(verdict, Verdict)
    return verdict


def test_a_clear_film_is_reported_with_every_number(bundle: Bundle) -> None:
    verdict = one(bundle, image(9, 0, 8, 0, 0))
    assert (verdict.label, verdict.decision, verdict.is_chest) == ("COVID19", Decision.REPORTED, True)
    assert verdict.confidence == pytest.approx(verdict.probabilities["COVID19"]) and verdict.confidence > 0.99
    assert verdict.logits == {"NORMAL": 0, "COVID19": 8, "PNEUMONIA": 0, "TUBERCULOSIS": 0}
    assert sum(verdict.probabilities.values()) == pytest.approx(1)


def test_the_disease_model_runs_only_on_what_passed(bundle: Bundle) -> None:
    engine = FakeEngine()
    verdicts = scored(bundle, image(-9), image(9, 9), image(-9), image(9, 0, 0, 9), engine=engine)
    assert [v.label for v in verdicts if isinstance(v, Verdict)] == [NOT_CHEST, "NORMAL", NOT_CHEST, "PNEUMONIA"]
    assert engine.batches == [(GATE, 4), (DISEASE, 2)]
    not_chest = verdicts[0]
    assert isinstance(not_chest, Verdict)
    assert (not_chest.decision, not_chest.is_chest, not_chest.logits) == (Decision.NOT_CHEST, False, {})
    assert not_chest.confidence == pytest.approx(1 - not_chest.gate_probability)  # type: ignore[operator]


def test_nothing_passes_and_the_disease_model_stays_silent(bundle: Bundle) -> None:
    engine = FakeEngine()
    scored(bundle, image(-9), image(-9), engine=engine)
    assert engine.batches == [(GATE, 2)]


def test_a_batch_of_nothing_but_rejected_files_scores_nothing(bundle: Bundle) -> None:
    assert scored(bundle) == []


@pytest.mark.parametrize(
    ("film", "reasons"),
    [
        (image, ("low_confidence",)),
        (lambda *a: image(*a, features=(9, 9)), ("low_confidence", "unlike_training")),
        (lambda *a: image(*a, flags=["tiny", "colour"]), ("low_confidence", "tiny")),
    ],
)
def test_what_the_model_does_not_know_goes_to_review(bundle: Bundle, film: object, reasons: tuple[str, ...]) -> None:
    verdict = one(bundle, film(9, 1, 1, 1, 1))  # type: ignore[operator]
    assert (verdict.decision, verdict.review_reasons) == (Decision.NEEDS_REVIEW, reasons)


def test_temperature_softens_confidence_and_not_logits(bundle: Bundle) -> None:
    soft = replace(bundle, stages=(bundle.stages[0], replace(bundle.stages[1], temperature=4.0)))
    hard, softened = one(bundle, image(9, 0, 4)), one(soft, image(9, 0, 4))
    assert softened.confidence < hard.confidence and softened.logits == hard.logits


@pytest.mark.parametrize("film", [(127,), (9, 0, 127)])
def test_numbers_that_are_not_finite_are_a_reason_and_never_a_label(bundle: Bundle, film: tuple[int, ...]) -> None:
    bad, good = scored(bundle, image(*film), image(9, 9))
    assert isinstance(bad, Rejected) and bad.reason_code is ReasonCode.NON_FINITE_OUTPUT
    assert isinstance(good, Verdict) and good.label == "NORMAL"


def test_an_engine_that_fails_on_one_image_costs_that_image_and_it_is_tried_again_later(bundle: Bundle) -> None:
    good, bad = scored(bundle, image(9, 9), image(9, 9, tag=5), engine=FakeEngine(fail_on=5))
    assert isinstance(good, Verdict)
    assert isinstance(bad, Retry) and bad.reason_code is ReasonCode.ENGINE_FAILED


def test_a_cascade_without_a_gate(tmp_path: Path) -> None:
    verdict = one(load_bundle(make_bundle(tmp_path / "b", with_gate=False)), image(0, 0, 0, 0, 9))
    assert (verdict.label, verdict.is_chest, verdict.gate_probability) == ("TUBERCULOSIS", None, None)


def test_the_ood_score_is_the_distance_to_the_nearest_mean() -> None:
    ood = Ood(np.array([[2, 0]], np.float32), np.array([[0], [10]], np.float32), 4.0, unit=False)
    np.testing.assert_allclose(ood_scores(np.array([[1, 7], [4, 0]], np.float32), ood), [0.5, 0.5])


def test_the_ood_score_knows_a_direction_and_not_a_length() -> None:
    ood = Ood(np.array([[2, 0]], np.float32), np.array([[0], [2]], np.float32), 0.5)
    found = ood_scores(np.array([[3, 4], [30, 40], [5, 0], [0, 0]], np.float32), ood)
    np.testing.assert_allclose(found, [1.6, 1.6, 0.0, 0.0], atol=1e-6)
