"""One comparison: the images of a span beside the days accepted here, or beside the bundle's reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.ops.drift_statistics import ENOUGH, NUMBERS, Finding, Rows, compare_days, compare_reference
from cxrbatch.store import Store
from cxrbatch.store.drift import Span, accept_days, accepted_days, read_outcomes, read_overrides
from cxrbatch.training.reference import REFUSED, Reference, read_reference

__all__ = ["Drift", "accept_span", "measure_drift", "reference_of"]

_MOST_ROWS = 200_000  # of a window; the newest ones


@dataclass(frozen=True, slots=True)
class Drift:
    """One comparison. `findings` is empty where there are not enough images."""

    cascade: str
    span: Span
    n: int  # images scored in the window
    days: int
    baseline: str  # what it was compared with, in words
    baseline_n: int
    findings: list[Finding]
    window_rows: Rows
    baseline_rows: Rows | None  # None: a histogram of the bundle
    not_compared: dict[str, str]  # names of statistics, and why
    reads: int = 0  # blinded, of rounds drawn at random, in the window
    overrides: int = 0  # of them, with another label than the model's

    @property
    def enough(self) -> bool:
        return self.n >= ENOUGH

    @property
    def alarming(self) -> list[str]:
        return [finding.name for finding in self.findings if finding.alarming]

    def as_json(self) -> dict[str, Any]:
        return {
            "cascade": self.cascade,
            "since": self.span.since.isoformat(),
            "until": self.span.until.isoformat(),
            "images": self.n,
            "days": self.days,
            "enough": self.enough,
            "baseline": self.baseline,
            "baseline_images": self.baseline_n,
            "alarm": bool(self.alarming),
            "random_reads": self.reads,
            "random_reads_that_differ": self.overrides,
            "statistics": [asdict(finding) | {"alarming": finding.alarming} for finding in self.findings],
            "not_compared": self.not_compared,
        }


def reference_of(bundle: Bundle) -> Reference | None:
    """Raises Fatal (exit 12) where the reference block of the bundle cannot be used."""
    try:
        return read_reference(bundle.manifest)
    except ValueError as error:
        why = f"The reference of the bundle {bundle.name} cannot be used ({error}); restore the bundle."
        raise Fatal(why, ExitCode.BUNDLE_UNUSABLE) from None


def measure_drift(store: Store, bundle: Bundle, exact: bool, span: Span) -> Drift:
    """Compare a span with the days accepted here, or else with the reference of the bundle.

    Raises Fatal where there is neither, and StoreDown.
    """
    cascade_id = store.cascade_id_of(bundle.key(exact)) or 0
    window = _rows(read_outcomes(store, cascade_id, span, _MOST_ROWS))
    accepted, baseline = accepted_days(store), None
    if accepted is not None:
        rows = _rows(read_outcomes(store, cascade_id, accepted, _MOST_ROWS))
        baseline = _without(rows, window.day)
    reference = reference_of(bundle)
    name = f"{bundle.name} {bundle.version}"
    days = len(np.unique(window.day))
    reads, overrides = read_overrides(store, cascade_id, span)

    def found(words: str, n: int, findings: list[Finding], rows: Rows | None) -> Drift:
        left_out = {} if window.scored < ENOUGH else _not_compared(window, findings, rows is None)
        return Drift(name, span, window.scored, days, words, n, findings, window, rows, left_out, reads, overrides)

    if baseline is not None and accepted is not None and baseline.scored >= ENOUGH:
        words = f"the days accepted here, {accepted.since:%Y-%m-%d} to {accepted.until:%Y-%m-%d}"
        findings = compare_days(window, baseline) if window.scored >= ENOUGH else []
        return found(words, baseline.scored, findings, baseline)
    if reference is None:
        raise Fatal(
            f"The bundle {bundle.name} has no reference, and no other days with {ENOUGH} images are accepted here: "
            "accept days that you trust with `cxrbatch drift --since 30d --accept`."
        )
    findings = compare_reference(window, reference, bundle.gate is not None) if window.scored >= ENOUGH else []
    why = "" if baseline is None else f"; the days accepted here hold {baseline.scored:,} images outside this span"
    return found(f"the reference of the bundle ({reference.name}){why}", reference.n, findings, None)


def accept_span(store: Store, bundle: Bundle, exact: bool, span: Span) -> Rows:
    """Keep a span as the days that later ones are compared with; returns its rows. Raises Fatal where they are few."""
    cascade_id = store.cascade_id_of(bundle.key(exact)) or 0
    rows = _rows(read_outcomes(store, cascade_id, span, _MOST_ROWS))
    if rows.scored < ENOUGH:
        raise Fatal(f"These days hold {rows.scored:,} images of this cascade; {ENOUGH} are the least to compare with.")
    accept_days(store, span, rows.scored)
    return rows


def _not_compared(window: Rows, findings: list[Finding], with_reference: bool) -> dict[str, str]:
    """The numbers of images that could not be compared, and why."""
    found = {one.name for one in findings}
    reasons: dict[str, str] = {}
    for name in NUMBERS:
        if f"{name}_ks" not in found:
            elsewhere = "not in the reference" if with_reference else "not in the accepted days"
            most = 2 * np.isfinite(getattr(window, name)).sum() >= np.isfinite(window.confidence).sum()
            reasons[f"{name}_ks"] = elsewhere if most else "not known of these images"
    return reasons


def _rows(outcomes: Any) -> Rows:
    def numbers(name: str) -> Any:
        return np.array([getattr(one, name) for one in outcomes], float)  # None becomes NaN

    chest = np.array([one.label not in (None, *REFUSED) for one in outcomes], bool)
    return Rows(
        day=np.array([one.processed_at.toordinal() for one in outcomes], np.int64),
        label=np.array([one.label or "" for one in outcomes], np.str_),
        confidence=np.where(chest, numbers("confidence"), np.nan),
        ood_score=np.where(chest, numbers("ood_score"), np.nan),
        grey_mean=np.where(chest, numbers("grey_mean"), np.nan),
        gate_probability=numbers("gate_probability"),
    )


def _without(rows: Rows, days: Any) -> Rows:
    kept = ~np.isin(rows.day, days)
    return Rows(*(getattr(rows, name)[kept] for name in Rows.__slots__))
