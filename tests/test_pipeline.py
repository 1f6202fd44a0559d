"""The same bytes are scored once, also while their verdict is still on its way to the store."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.nouns import Decision, DecodedImage, FoundFile, ImageFacts, Outcome, Verdict
from cxrbatch.pipeline import score
from cxrbatch.store import Patience

VERDICT = Verdict("NORMAL", 0.9, Decision.REPORTED, True, 1.0)


def film(path: str, content: str) -> Outcome:
    return Outcome(FoundFile(path, 1, 1, 1), DecodedImage(content, ImageFacts("png", 64, 64, 8), {}))


def test_what_is_in_flight_is_not_scored_again_until_it_has_landed() -> None:
    asked: list[str] = []

    def answers(images: Sequence[DecodedImage]) -> list[Verdict | Rejected]:
        asked.extend(image.sha256 for image in images)
        broken = Rejected(ReasonCode.NON_FINITE_OUTPUT, "")
        return [broken if image.sha256 == "broken" else VERDICT for image in images]

    nothing: Any = SimpleNamespace(verdicts_of=lambda contents, cascade_id: set())
    batches = [[film("/a", "x"), film("/b", "broken")], [], [film("/c", "x"), film("/d", "broken")], [film("/e", "x")]]
    in_flight: set[str] = set()
    cascade: Any = SimpleNamespace(score=answers)
    scored = score(iter(batches), cascade, nothing, 1, "none", Patience(), in_flight)

    first = next(scored)
    assert [o.verdict for o in first] == [VERDICT, None]
    assert next(scored) == []
    linked, again = next(scored)
    assert linked.verdict is None and linked.rejected is None  # known content: the store has it before this one
    assert again.rejected is not None  # what was rejected has no verdict to be linked to
    assert asked == ["x", "broken", "broken"]
    in_flight.clear()  # recorded, or dropped because its lease was lost
    assert next(scored)[0].verdict is VERDICT
