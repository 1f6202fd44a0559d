"""A progress bar during a scan and a table after it; without a terminal, only one line of JSON at the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cxrbatch.pipeline.counts import Counts

__all__ = ["NOT_A_DIAGNOSIS", "ScanSummary", "print_summary", "progress_bar"]

NOT_A_DIAGNOSIS = "For research; decision support only, not a diagnosis."

_COLOURS = {"NORMAL": "green", "NOT_CHEST": "blue", "rejected": "red", "needs review": "yellow"}


@dataclass(frozen=True, slots=True)
class ScanSummary:
    """What the store now holds for the scanned folders, and what this run did."""

    files: int
    labels: dict[str, int]
    needs_review: dict[str, int]  # of each label
    rejected: dict[str, int]  # by reason code
    missing: int  # known before and gone from the folder
    processed_now: int
    unchanged: int  # not opened: same path, size and mtime as last time
    seconds: float
    stopped: bool


@contextmanager
def progress_bar(console: Console, count_files: Callable[[threading.Event], int]) -> Iterator[Callable[[Counts], None]]:
    """A live bar with rate, time left and counts. `count_files` runs in parallel, so that the total is known early."""
    if not console.is_terminal:
        yield lambda counts: None
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]scan"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>9}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        expand=True,
    )
    row = bar.add_task("scan", total=None, rate="")
    tallies = Text("starting decode workers and models …", style="dim")
    quit_counting, one_at_a_time = threading.Event(), threading.Lock()

    def count() -> None:
        bar.update(row, total=count_files(quit_counting))

    threading.Thread(target=count, name="count", daemon=True).start()
    with Live(Group(bar, tallies), console=console, refresh_per_second=8, transient=True):

        def update(counts: Counts) -> None:
            with one_at_a_time:  # unchanged files are reported by the thread that looks them up
                speed = bar.tasks[row].speed
                bar.update(row, completed=counts.done, rate=f"{speed:,.1f}/s" if speed else "")
                tallies.truncate(0)
                tallies.append_text(_tally(counts))

        try:
            yield update
        finally:
            quit_counting.set()


def _tally(counts: Counts) -> Text:
    text = Text()
    entries = [*sorted(counts.labels.items())]
    entries += [("needs review", counts.decisions["needs_review"]), ("rejected", counts.rejected.total())]
    entries += [("known content", counts.known_image), ("unchanged", counts.unchanged)]
    for name, number in entries:
        if number:
            text.append(f"{name} ", style="dim").append(f"{number:,}   ", style=_COLOURS.get(name, ""))
    return text


def print_summary(console: Console, summary: ScanSummary) -> None:
    """The closing table on a terminal; elsewhere one JSON object."""
    if not console.is_terminal:
        with suppress(BrokenPipeError):  # the exit code still says how it ended
            console.file.write(json.dumps(asdict(summary)) + "\n")
        return
    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=True, footer_style="bold")
    table.add_column("label", footer="files")
    table.add_column("files", justify="right", footer=f"{summary.files:,}")
    table.add_column("of them need review", justify="right", footer=f"{sum(summary.needs_review.values()):,}")
    for label, number in sorted(summary.labels.items()):
        review = summary.needs_review.get(label, 0)
        table.add_row(Text(label, _COLOURS.get(label, "")), f"{number:,}", f"{review:,}" if review else "·")
    for reason, number in sorted(summary.rejected.items(), key=lambda item: -item[1]):
        table.add_row(Text(f"rejected: {reason}", "red"), f"{number:,}", "")
    console.print(table)
    rate = f" ({summary.processed_now / summary.seconds:,.1f}/s)" if summary.seconds and summary.processed_now else ""
    console.print(
        f"\n{summary.processed_now:,} file(s) read in {summary.seconds:,.1f} s{rate}; "
        f"{summary.unchanged:,} unchanged since last time and not opened.",
        highlight=False,
    )
    if summary.missing:
        console.print(f"{summary.missing:,} known file(s) are gone from here; their rows are kept.", highlight=False)
    if summary.stopped:
        console.print("Stopped early; what is finished is kept. Run the same command again to go on.", style="yellow")
    console.print(NOT_A_DIAGNOSIS, style="dim")
