"""What one run has done so far, for the progress bar and the closing table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cxrbatch.types import Outcome

__all__ = ["Counts"]


@dataclass(slots=True)
class Counts:
    """Numbers of files since the command started."""

    found: int = 0
    unchanged: int = 0
    known_image: int = 0  # the same bytes under another name: linked, not scored again
    labels: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason code
    complete: bool = False  # the walk finished
    unlisted: list[str] = field(default_factory=list)  # folders whose files it could not list

    @property
    def done(self) -> int:
        return self.unchanged + self.processed

    @property
    def processed(self) -> int:
        return self.scored + self.rejected.total()

    @property
    def scored(self) -> int:
        return self.labels.total() + self.known_image

    def add(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.rejected is not None:
                self.rejected[outcome.rejected.reason_code] += 1
            elif outcome.prediction is None:
                self.known_image += 1
            else:
                self.labels[outcome.prediction.label] += 1
                self.decisions[outcome.prediction.decision] += 1
