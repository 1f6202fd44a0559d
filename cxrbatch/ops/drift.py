"""`cxrbatch drift`: are the images, or what is said of them, other than they used to be?"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.ops.drift_comparison import Drift, accept_span, measure_drift, reference_of
from cxrbatch.ops.drift_statistics import ENOUGH, wilson
from cxrbatch.ops.progress import NOT_A_DIAGNOSIS
from cxrbatch.ops.terminal import plain, to_stdout
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.drift import Span

__all__ = ["parse_span", "print_drift"]

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
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # the year 1 at +23:00 is the year 0 in UTC
        raise Fatal(f"'{text}' is no time; write 30d, 12h or 2026-01-31.", ExitCode.USAGE) from None


def print_drift(settings: Settings, span: Span, *, as_json: bool, png: Path | None, accept: bool) -> None:
    """One comparison as table or JSON, and as a plot; or the days accepted. Raises Fatal, StoreDown."""
    bundle = load_bundle(settings.cascade)
    with Store.open(settings.db, may_create=False, read_only=not accept) as store:
        if accept:
            rows = accept_span(store, bundle, settings.exact, span)
            days = len(np.unique(rows.day))
            print(f"Accepted: {rows.scored:,} images of {days} day(s) are what later ones are compared with.")
            return
        drift = measure_drift(store, bundle, settings.exact, span)
    if png is not None:
        from cxrbatch.ops.drift_plot import plot_drift

        plot_drift(drift, reference_of(bundle), png)
    if as_json:
        print(json.dumps(drift.as_json(), indent=2))
    else:
        _print(drift)


def _print(drift: Drift) -> None:
    console = to_stdout()
    span = f"{drift.span.since:%Y-%m-%d %H:%M} to {drift.span.until:%Y-%m-%d %H:%M} UTC"
    console.print(f"{drift.n:,} images of {drift.days} day(s), {span}, {plain(drift.cascade)}")
    console.print(f"compared with {drift.baseline_n:,} images: {plain(drift.baseline)}")
    if drift.reads:
        low, high = wilson(drift.overrides, drift.reads)
        share = f"{100 * drift.overrides / drift.reads:.1f} % ({100 * low:.1f}-{100 * high:.1f} %)"
        console.print(f"readers differ in {share} of {drift.reads:,} blinded reads of random rounds")
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
