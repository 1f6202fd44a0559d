"""The verbs that read films and show what was made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cxrbatch.cli.given import given

__all__ = ["app"]

app = typer.Typer()
_EXACT = "Decode and window every pixel of large pictures."


@app.command()
def scan(
    paths: Annotated[list[Path], typer.Argument(help="Folders and files to read; nothing in them is changed.")],
    csv: Annotated[str | None, typer.Option(help="Write the rows of these paths to this file; - is stdout.")] = None,
    jsonl: Annotated[str | None, typer.Option(help="The same as JSON lines.")] = None,
    parquet: Annotated[str | None, typer.Option(help="The same as Parquet (needs the extra 'parquet').")] = None,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0,1")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, torch or openvino")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one pass of the networks; 0 is what suits the engine.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decode processes; 0 is one a core.")] = None,
    exact: Annotated[bool | None, typer.Option("--exact/--no-exact", help=_EXACT)] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only names or paths like this glob (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not names or paths like this glob (repeatable).")] = None,
    reprocess: Annotated[
        Literal["none", "failed", "all"], typer.Option(help="Which unchanged files to read again.")
    ] = "none",
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most so many files that need it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many files would be read.")] = False,
    error_on_empty: Annotated[bool, typer.Option("--error-on-empty", help="Exit 4 when nothing matched.")] = False,
) -> None:
    """One pass over folders: every file becomes one row. Run it again: only what is new or changed is opened."""
    from cxrbatch.ops.scan import Exports, run_scan

    settings = given.settings(
        cascade=cascade,
        device=device,
        engine=engine,
        batch_size=batch_size,
        workers=workers,
        exact=exact,
        include=include or None,
        exclude=exclude or None,
    )
    code = run_scan(
        settings,
        paths,
        Exports(csv=csv, jsonl=jsonl, parquet=parquet),
        reprocess=reprocess,
        limit=limit,
        dry_run=dry_run,
        error_on_empty=error_on_empty,
        quiet=given.quiet,
    )
    raise typer.Exit(code)


@app.command()
def watch(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Nothing in them is changed.")],
    once: Annotated[bool, typer.Option("--once", help="End when everything that is there has its outcome.")] = False,
    quiet_s: Annotated[float | None, typer.Option("--quiet", help="Seconds a file has to stand still.")] = None,
    rescan_s: Annotated[float | None, typer.Option("--rescan", help="Seconds between two walks.")] = None,
    poll: Annotated[str | None, typer.Option(help="auto, always or never: walk often, trust no events")] = None,
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT: also receive by DICOM C-STORE into DIR.")] = None,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0,1")] = None,
    workers: Annotated[int | None, typer.Option(help="Decode processes; 0 is one a core.")] = None,
    exact: Annotated[bool | None, typer.Option("--exact/--no-exact", help=_EXACT)] = None,
) -> None:
    """The daemon: every file that comes to stand still becomes one row, through crashes and dropped shares."""
    from cxrbatch.ops.watch import run_watch

    flags = {"quiet_s": quiet_s, "rescan_s": rescan_s, "poll": poll, "listen": listen}
    flags |= {"cascade": cascade, "device": device, "workers": workers, "exact": exact}
    code = run_watch(lambda: given.settings(**flags), folders, once=once, verbose=given.verbose)
    raise typer.Exit(code)


@app.command()
def receive(
    folder: Annotated[Path, typer.Argument(help="Where to put what is sent, for `cxrbatch watch` to find.")],
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112")] = None,
) -> None:
    """The DICOM receiver alone (C-ECHO and C-STORE): what is acknowledged is on the disk."""
    from cxrbatch.ops.receive import run_receive

    raise typer.Exit(run_receive(given.settings(listen=listen), folder, verbose=given.verbose))


@app.command()
def retry(
    reason: Annotated[str | None, typer.Option(help="Only files with this reason code, e.g. truncated.")] = None,
) -> None:
    """Let files that failed be tried again, by the watch that is running or the next scan."""
    from cxrbatch.ops.results import retry_failed

    retry_failed(given.settings(), reason)


@app.command()
def results(
    label: Annotated[str | None, typer.Option(help="Only this label, e.g. COVID19; surest first.")] = None,
    min_confidence: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    needs_review: Annotated[bool, typer.Option("--needs-review", help="Only for review; least sure first.")] = False,
    since: Annotated[
        str | None, typer.Option(help="Processed from this time on (ISO 8601, UTC); newest first.")
    ] = None,
    under: Annotated[Path | None, typer.Option(help="Only files in this folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    format: Annotated[Literal["table", "csv", "jsonl"], typer.Option(help="How to print them.")] = "table",
) -> None:
    """The rows of the store, without SQL. CSV, JSON lines and tables of a folder or a time go by path."""
    from cxrbatch.ops.results import print_results

    print_results(
        given.settings(),
        format,
        label=label,
        min_confidence=min_confidence,
        needs_review=needs_review,
        since=since,
        under=under,
        limit=limit,
    )


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="FILE.csv, FILE.jsonl or FILE.parquet")],
    under: Annotated[Path | None, typer.Option(help="Only files in this folder.")] = None,
) -> None:
    """The whole store as one file, written beside its name first and then renamed."""
    from cxrbatch.ops.results import export_results

    export_results(given.settings(), file, under)


@app.command()
def show(what: Annotated[str, typer.Argument(help="A file's path, or the SHA-256 of its content.")]) -> None:
    """All that is known of one film: how it was read, every number, what made it, its history."""
    from cxrbatch.ops.results import show_one

    show_one(given.settings(), what)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="A film.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
) -> None:
    """What moved the score of one film: Grad-CAM over the picture that the network got."""
    from cxrbatch.bundles import find_bundle
    from cxrbatch.training.gradcam import explain

    explain(file, find_bundle(given.settings(cascade=cascade).cascade), out)
