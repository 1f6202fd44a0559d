"""The same bytes are scored once, even while their prediction is not yet in the store; a look-up is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from cxrbatch.errors import ReasonCode, Rejected, StoreDown
from cxrbatch.pipeline import Counts, Sink, find_changed, score
from cxrbatch.store import RetryPolicy
from cxrbatch.types import Decision, DecodedImage, FoundFile, ImageFacts, Outcome, Prediction

PREDICTION = Prediction("NORMAL", 0.9, Decision.REPORTED, True, 1.0)


def scored_file(path: str, content: str) -> Outcome:
    return Outcome(FoundFile(path, 1, 1, 1), DecodedImage(content, ImageFacts("png", 64, 64, 8), {}))


def test_what_is_in_flight_is_not_scored_again_until_it_has_landed() -> None:
    asked: list[str] = []

    def answers(images: Sequence[DecodedImage]) -> list[Prediction | Rejected]:
        asked.extend(image.sha256 for image in images)
        broken = Rejected(ReasonCode.NON_FINITE_OUTPUT, "")
        return [broken if image.sha256 == "broken" else PREDICTION for image in images]

    nothing: Any = SimpleNamespace(predicted=lambda contents, cascade_id: set())
    batches = [
        [scored_file("/a", "x"), scored_file("/b", "broken")],
        [],
        [scored_file("/c", "x"), scored_file("/d", "broken")],
        [scored_file("/e", "x")],
    ]
    in_flight: set[str] = set()
    cascade: Any = SimpleNamespace(score=answers)
    scored = score(iter(batches), cascade, Sink(nothing, 1, print), RetryPolicy(), in_flight)

    first = next(scored)
    assert [o.prediction for o in first] == [PREDICTION, None]
    assert next(scored) == []
    linked, again = next(scored)
    assert linked.prediction is None and linked.rejected is None  # known content: the store has it before this one
    assert again.rejected is not None  # what was rejected has no prediction to be linked to
    assert asked == ["x", "broken", "broken"]
    in_flight.clear()  # recorded, or dropped because its lease was lost
    assert next(scored)[0].prediction is PREDICTION


def test_a_store_that_is_away_for_a_moment_does_not_end_a_look_up() -> None:
    answers = iter([StoreDown("It restarts."), {"/a"}])

    def unchanged(*_: Any, **__: Any) -> set[str]:
        answer = next(answers)
        if isinstance(answer, StoreDown):
            raise answer
        return answer

    store: Any = SimpleNamespace(unchanged=unchanged)
    found = [FoundFile("/a", 1, 1, 1), FoundFile("/b", 1, 1, 1)]
    assert list(find_changed(iter(found), store, 1, "none", Counts(), retry=RetryPolicy())) == found[1:]
