"""The commands of whoever keeps it running: status, drift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.cli.options import options
from cxrbatch.errors import ExitCode, Fatal

__all__ = ["app"]

app = typer.Typer()


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    warning_age_s: Annotated[
        float, typer.Option("--warning", min=0, help="Seconds that the oldest file may wait: then exit 1.")
    ] = 900.0,
    critical_age_s: Annotated[
        float, typer.Option("--critical", min=0, help="Seconds that the oldest file may wait: then exit 2.")
    ] = 3600.0,
) -> None:
    """What waits, how fast it goes, who works on it. Exit: 0 ok, 1 warning, 2 critical, 3 unknown (as Nagios)."""
    from cxrbatch.ops.status import Limits, print_status

    limits = Limits(warning_age_s=warning_age_s, critical_age_s=critical_age_s)
    raise typer.Exit(print_status(options.settings, limits, as_json=as_json))


@app.command()
def drift(
    since: Annotated[str, typer.Option(help="30d, 12h, or a date (ISO 8601, UTC).")] = "30d",
    until: Annotated[str | None, typer.Option(help="A date; now where it is not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    png: Annotated[Path | None, typer.Option(help="Also draw it (needs the extra 'train').")] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="These days are normal: compare later ones with them.")
    ] = False,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
) -> None:
    """Are images and answers other than they used to be? Compared with accepted days, else with the bundle's own."""
    if accept and (as_json or png is not None):
        raise Fatal("--accept compares nothing: leave --json and --png out.", ExitCode.USAGE)
    from cxrbatch.ops.drift import parse_span, print_drift

    print_drift(options.settings(cascade=cascade), parse_span(since, until), as_json=as_json, png=png, accept=accept)
