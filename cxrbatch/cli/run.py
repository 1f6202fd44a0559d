"""The commands that read images and show the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cxrbatch.cli.options import options
from cxrbatch.errors import ExitCode, Fatal

__all__ = ["app"]

app = typer.Typer()
_EXACT = "Decode and window every pixel of large images."


@app.command()
def scan(
    paths: Annotated[
        list[str],
        typer.Argument(help="Folders, files, s3://BUCKET/PREFIX, sftp://HOST/DIR; nothing is changed."),
    ],
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
    ray: Annotated[
        str | None, typer.Option(help="Work on the nodes of a Ray cluster at HOST:PORT; needs Postgres.")
    ] = None,
) -> None:
    """One pass over folders: every file becomes one row. A second run opens only new or changed files."""
    from cxrbatch.ops.scan import Exports, run_scan

    settings = options.settings(
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
        ray=ray,
        quiet=options.quiet,
    )
    if named := [name for name in (csv, jsonl, parquet) if name and not dry_run]:
        from cxrbatch.ops.trail import note_export

        note_export(settings, f"rows of a scan to {', '.join(named)}")
    raise typer.Exit(code)


@app.command()
def watch(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR", help="Or s3://BUCKET/PREFIX, sftp://HOST/DIR; nothing is changed.")
    ],
    once: Annotated[bool, typer.Option("--once", help="End when everything that is there has its outcome.")] = False,
    quiet_s: Annotated[float | None, typer.Option("--quiet", help="Seconds a file has to stand still.")] = None,
    rescan_s: Annotated[float | None, typer.Option("--rescan", help="Seconds between two walks.")] = None,
    poll: Annotated[str | None, typer.Option(help="auto, always or never: walk often, trust no events")] = None,
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT: also receive by DICOM C-STORE into DIR.")] = None,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT: serve /metrics, /healthz and /readyz.")] = None,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0,1")] = None,
    workers: Annotated[int | None, typer.Option(help="Decode processes; 0 is one a core.")] = None,
    exact: Annotated[bool | None, typer.Option("--exact/--no-exact", help=_EXACT)] = None,
) -> None:
    """The daemon. Score each file once it has stopped changing; survives crashes and dropped shares."""
    from cxrbatch.ops.watch import run_watch

    flags = {"quiet_s": quiet_s, "rescan_s": rescan_s, "poll": poll, "listen": listen}
    flags |= {"metrics": metrics, "cascade": cascade, "device": device, "workers": workers, "exact": exact}
    code = run_watch(lambda: options.settings(**flags), folders, once=once, verbose=options.verbose)
    raise typer.Exit(code)


@app.command()
def receive(
    folder: Annotated[Path, typer.Argument(help="Where to put what is sent, for `cxrbatch watch` to find.")],
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112")] = None,
    metrics: Annotated[str | None, typer.Option(help="HOST:PORT: serve /metrics, /healthz and /readyz.")] = None,
) -> None:
    """The DICOM receiver alone (C-ECHO and C-STORE): what is acknowledged is on disk."""
    from cxrbatch.ops.receive import run_receive

    raise typer.Exit(run_receive(options.settings(listen=listen, metrics=metrics), folder, verbose=options.verbose))


@app.command()
def retry(
    reason: Annotated[str | None, typer.Option(help="Only files with this reason code, e.g. truncated.")] = None,
) -> None:
    """Queue failed files again, for the running watch or the next scan."""
    from cxrbatch.ops.results import retry_failed

    retry_failed(options.settings(), reason)


@app.command()
def results(
    label: Annotated[str | None, typer.Option(help="Only this label, e.g. COVID19; surest first.")] = None,
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Only from this confidence on, 0 to 1.")
    ] = None,
    needs_review: Annotated[bool, typer.Option("--needs-review", help="Only for review; least sure first.")] = False,
    since: Annotated[
        str | None, typer.Option(help="Processed from this time on (ISO 8601, UTC); newest first.")
    ] = None,
    under: Annotated[str | None, typer.Option(help="Only files in this folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    format: Annotated[Literal["table", "csv", "jsonl"], typer.Option(help="How to print them.")] = "table",
) -> None:
    """The rows of the store, without SQL. CSV, JSON lines and tables of a folder or a time go by path."""
    from cxrbatch.ops.results import print_results

    print_results(
        options.settings(),
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
    file: Annotated[str | None, typer.Argument(help="FILE.csv, FILE.jsonl or FILE.parquet")] = None,
    under: Annotated[str | None, typer.Option(help="Only files in this folder.")] = None,
    reviewed: Annotated[bool, typer.Option("--reviewed", help="Images with a final label: see --as-dataset.")] = False,
    as_dataset: Annotated[Path | None, typer.Option(help="A new folder, DIR/<label>/…, for `train`.")] = None,
    dicom: Annotated[
        Path | None, typer.Option(help="A folder: a capture and a report of each image that came as DICOM.")
    ] = None,
) -> None:
    """The whole store as one file, as DICOM objects, or what was reviewed as a dataset."""
    if reviewed != (as_dataset is not None) or sum(one is not None for one in (file, as_dataset, dicom)) != 1:
        raise Fatal(
            "Name a FILE to export the rows, --dicom DIR for DICOM objects, or --reviewed --as-dataset DIR for a "
            "dataset.",
            ExitCode.USAGE,
        )
    if as_dataset is not None and under is not None:
        raise Fatal("--as-dataset takes every image with a final label: leave --under out.", ExitCode.USAGE)
    if dicom is not None:
        from cxrbatch.ops.send import export_dicom
        from cxrbatch.ops.trail import note_export

        settings = options.settings()
        code = export_dicom(settings, dicom, under, quiet=options.quiet)
        note_export(settings, f"DICOM objects to {dicom}")
        raise typer.Exit(code)
    if as_dataset is not None:
        from cxrbatch.ops.feedback import export_dataset
        from cxrbatch.ops.terminal import user_name

        export_dataset(options.settings(), as_dataset, user_name())
        return
    from cxrbatch.ops.results import export_results

    assert file is not None
    export_results(options.settings(), file, under)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A file's path, or the SHA-256 of its content.")],
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON document, for programs.")] = False,
) -> None:
    """All that is known about one image: how it was read, every number, what produced it, its history."""
    if as_json:
        from cxrbatch.ops.trace import print_trace

        print_trace(options.settings(), what)
        return
    from cxrbatch.ops.results import show_one

    show_one(options.settings(), what)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="An image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
) -> None:
    """Show what raised the score of one image: Grad-CAM over the network's input image."""
    from cxrbatch.inference.bundle import find_bundle
    from cxrbatch.training.gradcam import explain

    explain(file, find_bundle(options.settings(cascade=cascade).cascade), out)
