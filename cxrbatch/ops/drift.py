"""`cxrbatch drift`: are the images, or what is said of them, other than they used to be?"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.ops.drift_statistics import ENOUGH, NUMBERS, Finding, Rows, compare_days, compare_reference, wilson
from cxrbatch.ops.progress import NOT_A_DIAGNOSIS
from cxrbatch.ops.terminal import plain, to_stdout
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.drift import Span, accept_days, accepted_days, read_outcomes, read_overrides
from cxrbatch.training.reference import REFUSED, Reference, read_reference

__all__ = ["Drift", "measure_drift", "parse_span", "print_drift", "reference_of"]

_MOST_ROWS = 200_000  # of a window; the newest ones
_AGO = re.compile(r"(\d{1,5})([dh])")
_MEANING = {
    "label_psi": "mix of labels (PSI)",
    "confidence_ks": "confidence (KS distance)",
    "ood_score_ks": "ood_score (KS distance)",
    "grey_mean_ks": "mean grey (KS distance)",
    "gate_rate": "refused by the gate",
    "unlike_rate": "unlike the training data",
    "reject_rate": "rejected files",
}


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


def parse_span(since: str, until: str | None, now: datetime | None = None) -> Span:
    """ "30d", "12h" or a date (ISO 8601, UTC). Raises Fatal (exit 2)."""
    moment = now or datetime.now(UTC)
    ago = _AGO.fullmatch(since)
    if ago:
        size = timedelta(days=int(ago[1])) if ago[2] == "d" else timedelta(hours=int(ago[1]))
        start = moment - size
    else:
        start = _moment(since)
    end = moment if until is None else _moment(until)
    if start >= end:
        raise Fatal("The span is empty: --since must be earlier than --until.", ExitCode.USAGE)
    return Span(start, end)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Fatal(f"'{text}' is no time; write 30d, 12h or 2026-01-31.", ExitCode.USAGE) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


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
    return found(f"the reference of the bundle ({reference.name})", reference.n, findings, None)


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


def print_drift(settings: Settings, span: Span, *, as_json: bool, png: Path | None, accept: bool) -> None:
    """One comparison as table or JSON, and as a plot; or the days accepted. Raises Fatal, StoreDown."""
    bundle = load_bundle(settings.cascade)
    with Store.open(settings.db, may_create=False) as store:
        if accept:
            _accept(store, bundle, settings.exact, span)
            return
        drift = measure_drift(store, bundle, settings.exact, span)
    if png is not None:
        from cxrbatch.ops.drift_plot import plot_drift

        plot_drift(drift, reference_of(bundle), png)
    if as_json:
        print(json.dumps(drift.as_json(), indent=2))
    else:
        _print(drift)


def _accept(store: Store, bundle: Bundle, exact: bool, span: Span) -> None:
    cascade_id = store.cascade_id_of(bundle.key(exact)) or 0
    rows = _rows(read_outcomes(store, cascade_id, span, _MOST_ROWS))
    if rows.scored < ENOUGH:
        raise Fatal(f"These days hold {rows.scored:,} images of this cascade; {ENOUGH} are the least to compare with.")
    accept_days(store, span, rows.scored)
    print(f"Accepted: {rows.scored:,} images of {len(np.unique(rows.day))} days are what later ones are compared with.")


def _print(drift: Drift) -> None:
    console = to_stdout()
    span = f"{drift.span.since:%Y-%m-%d %H:%M} to {drift.span.until:%Y-%m-%d %H:%M} UTC"
    console.print(f"{drift.n:,} images of {drift.days} day(s), {span}, {plain(drift.cascade)}", highlight=False)
    console.print(f"compared with {drift.baseline_n:,} images: {plain(drift.baseline)}", highlight=False)
    if drift.reads:
        low, high = wilson(drift.overrides, drift.reads)
        share = f"{100 * drift.overrides / drift.reads:.1f} % ({100 * low:.1f}-{100 * high:.1f} %)"
        console.print(f"readers differ in {share} of {drift.reads:,} blinded reads of random rounds", highlight=False)
    if not drift.enough:
        console.print(f"Not enough images: {ENOUGH} are the least that can be compared.", style="yellow")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("what", "distance", "alarm above", "now", "95 % interval", "baseline", ""):
        table.add_column(heading, justify="left" if heading in ("what", "") else "right")
    for one in drift.findings:
        rate = ["", "", ""]
        if one.window is not None and one.window_interval is not None and one.baseline is not None:
            low, high = one.window_interval
            rate = [f"{100 * one.window:.1f} %", f"{100 * low:.1f}-{100 * high:.1f} %", f"{100 * one.baseline:.1f} %"]
        mark = Text("drift", "bold red") if one.alarming else Text("ok", "green")
        table.add_row(_MEANING[one.name], f"{one.score:.3f}", f"{one.threshold:.3f}", *rate, mark)
    for name, why in drift.not_compared.items():
        table.add_row(_MEANING[name], "", "", "", "", "", Text(why, "dim"))
    console.print(table)
    if drift.days < 5:
        console.print("Fewer than five days: how much days differ from one another is not known.", style="yellow")
    console.print(NOT_A_DIAGNOSIS, style="dim")


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
