"""`cxrbatch results | export | show | retry`: read the store without SQL."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from cxrbatch.errors import ExitCode, Fatal, ReasonCode
from cxrbatch.intake.remote import normal_path
from cxrbatch.ops.progress import NOT_A_DIAGNOSIS
from cxrbatch.ops.terminal import plain, tell, to_stdout
from cxrbatch.ops.trace import is_path
from cxrbatch.ops.trail import note_export
from cxrbatch.settings import Settings
from cxrbatch.store import Store, retry_now
from cxrbatch.store.export import check_writable, write_csv, write_jsonl, writer_for
from cxrbatch.types import INT64_MAX, Decision

__all__ = ["export_results", "moment_of", "print_results", "retry_failed", "show_one"]

_TABLE_ROWS = 200  # most rows of a table on a terminal
_PREDICTED = ("label", "label_set", "confidence", "abnormal_probability", "decision", "review_reasons")
_DECISIONS = {"reported": "green", "needs_review": "yellow", "not_chest": "blue"}


def print_results(
    settings: Settings,
    format: Literal["table", "csv", "jsonl"],
    *,
    label: str | None,
    min_confidence: float | None,
    needs_review: bool,
    since: str | None,
    under: str | None,
    limit: int | None,
) -> None:
    """Print the rows that match all filters. No match is not an error: exit 4 is not used here.

    Rows are sorted by path. A table with `since` is sorted by time, newest first; a table of one label by confidence,
    highest first; a table of rows that need review by confidence, lowest first.
    """
    filters: dict[str, Any] = {
        "label": label,
        "min_confidence": min_confidence,
        "decision": Decision.NEEDS_REVIEW if needs_review else None,
        "since": moment_of(since),
        "roots": _folder(under),
        "limit": limit if limit is None else min(limit, INT64_MAX),
    }
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        if format != "table":
            write = write_csv if format == "csv" else write_jsonl
            write("-", store.results(**filters))
            return
        filters["limit"] = min(limit or _TABLE_ROWS, _TABLE_ROWS) + 1
        by_filter = {"newest": since, "least sure": needs_review, "surest": label}
        order = "path" if under else next((order for order, given in by_filter.items() if given), "path")
        rows = list(store.results(**filters, order=order))
        if not rows:
            print("No row matches.")
            return
        console = to_stdout()
        console.print(_table(rows[: filters["limit"] - 1]))
        if len(rows) == filters["limit"] and limit is None:
            which = f"The first {_TABLE_ROWS} rows" if order == "path" else f"The {_TABLE_ROWS} {order} rows"
            console.print(f"{which}; --format csv prints all of them.", style="yellow")
        console.print(NOT_A_DIAGNOSIS, style="dim")


def export_results(settings: Settings, file: str, under: str | None) -> None:
    write = writer_for(file)
    check_writable(file)
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        number = write(file, store.results(roots=_folder(under)))
    note_export(settings, f"{number} row(s) to {file}")
    tell(f"{number:,} row(s) in {file}")


def show_one(settings: Settings, what: str) -> None:
    """Print everything about one path or content. Raises Fatal if nothing is known about it."""
    path = normal_path(what) if is_path(what) else what
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        try:
            images = store.everything_about(path)
        except ValueError as error:
            raise Fatal(f"{error}.") from None
    if not images:
        raise Fatal("The store knows no such file or content; `cxrbatch scan` its folder first.")
    console = to_stdout()
    for image in images:
        result = image.result
        console.print(Text(plain(result["path"]), "bold"))
        console.print(_fields(_headline(result)))
        if image.image is not None:
            skip = {"id", "sha256", "first_seen"}
            shown = [(k, v) for k, v in image.image.items() if k not in skip and v not in (None, "")]
            console.print(_section("how it was read"), _fields([("sha256", image.image["sha256"]), *shown]))
        for reported in image.predictions:
            cascade, run = reported.cascade, reported.run
            name = f"{cascade['name']} {cascade['version']} ({cascade['manifest_sha256'][:12]})"
            console.print(_section(f"what {plain(name)} says"))
            rows = [(k, reported.prediction[k]) for k in _PREDICTED]
            rows += [("gate_probability", reported.prediction["gate_probability"])]
            rows += [("ood_score", reported.prediction["ood_score"])]
            rows += [(s["label"], f"p {s['probability']:.4f}   logit {s['logit']:+.3f}") for s in reported.scores]
            rows += [("at", reported.prediction["processed_at"])]
            rows += [("run", f"{run['id']}, cxrbatch {run['version']}, {run['engine']} on {run['device']}")]
            console.print(_fields(rows))
        if image.reviews:
            said = [
                (str(r["at"]), f"{r['action']} {r['label'] or ''} by {plain(r['reviewer'])}") for r in image.reviews
            ]
            console.print(_section("what readers said"), _fields(said))
        if image.same_image:
            console.print(_section("the same bytes"), _fields([("path", p) for p in image.same_image]))
        if image.history:
            events = [(str(h["at"]), f"{h['event']} {h['old'] or ''} → {h['new'] or ''}") for h in image.history]
            console.print(_section("history"), _fields(events))
        console.print()
    console.print(NOT_A_DIAGNOSIS, style="dim")


def _headline(result: Any) -> list[tuple[str, Any]]:
    names = (
        "state", "label", "label_set", "confidence", "abnormal_probability", "decision", "reason_code", "reason",
        "review_reasons", "quality_flags",
    )  # fmt: skip
    return [(name, result[name]) for name in names if result[name] not in (None, "")]


def _section(title: str) -> Text:
    return Text(f"\n{title}", "dim")


def _fields(rows: Iterable[tuple[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", min_width=26)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            shown = f"{value:.4f}" if isinstance(value, float) else plain(str(value))
            table.add_row(name, Text(shown, _DECISIONS.get(shown, "")))
    return table


def _table(rows: Iterable[Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("file", "label", "conf.", "decision", "why"):
        table.add_column(heading, overflow="fold", ratio=3 if heading == "file" else None)
    for row in rows:
        confidence = "" if row.confidence is None else f"{row.confidence:.2f}"
        why = (row.reason_code or row.review_reasons or "").replace(",", ", ")  # so that lines break there
        decision = row.state if row.state == "missing" else row.decision or row.state  # a file that is gone
        table.add_row(
            plain(row.path), row.label or "", confidence, Text(decision, _DECISIONS.get(decision, "red")), plain(why)
        )
    return table


def _folder(under: str | None) -> list[str]:
    return [] if under is None else [normal_path(under)]


def moment_of(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Fatal(f"'{text}' is not a time; write it like 2026-01-31 or 2026-01-31T14:00.", ExitCode.USAGE) from None


def retry_failed(settings: Settings, reason: str | None) -> None:
    """Queue failed files again. Raises Fatal (exit 2) for a reason code that does not exist."""
    if reason is not None and reason not in set(ReasonCode):
        raise Fatal(f"No reason code '{reason}'; the ones there are: {', '.join(ReasonCode)}.", ExitCode.USAGE)
    with Store.open(settings.db, may_create=False) as store:
        number = retry_now(store, ReasonCode(reason) if reason else None)
    print(f"{number:,} file(s) are tried again by the watch that runs, or by the next scan.")
