"""The verbs that take results to a PACS: send, and `outbox …`."""

from __future__ import annotations

from typing import Annotated

import typer

from cxrbatch.cli.options import options

__all__ = ["app", "outbox"]

app = typer.Typer()
outbox = typer.Typer(no_args_is_help=True, help="What is to be sent, and what became of it: list, retry, drop.")

To = Annotated[str | None, typer.Option("--to", help="Only this destination.")]
Ids = Annotated[list[int] | None, typer.Argument(help="Ids of `cxrbatch outbox list`.")]


@app.command()
def send(
    to: Annotated[
        str, typer.Argument(metavar="DEST", help="A name of send_to, dicom://AET@HOST:PORT or https://HOST/dicom-web")
    ],
    under: Annotated[str | None, typer.Option(help="Only files in this folder.")] = None,
) -> None:
    """Send results to a PACS as Secondary Captures and structured reports, each once."""
    from cxrbatch.ops.send import run_send
    from cxrbatch.ops.trail import note_export

    settings = options.settings()
    code = run_send(settings, to, under, quiet=options.quiet)
    note_export(settings, f"results sent to {to}")
    raise typer.Exit(code)


@outbox.command("list")
def outbox_list(
    to: To = None,
    state: Annotated[str | None, typer.Option(help="waiting, sent, refused or dropped")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many rows.")] = 50,
) -> None:
    """The newest objects and what became of each."""
    from cxrbatch.ops.send import list_outbox

    list_outbox(options.settings(), to, state, limit)


@outbox.command("retry")
def outbox_retry(ids: Ids = None, to: To = None) -> None:
    """Let objects be sent again: all that were refused or wait, or those named, whatever became of them."""
    from cxrbatch.ops.send import retry_objects

    retry_objects(options.settings(), to, ids or [])


@outbox.command("drop")
def outbox_drop(
    ids: Ids = None, to: To = None, every: Annotated[bool, typer.Option("--all", help="All that are unsent.")] = False
) -> None:
    """Give up on objects that were not sent."""
    from cxrbatch.ops.send import drop_objects

    drop_objects(options.settings(), to, ids or [], every=every)
