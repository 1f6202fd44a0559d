"""`cxrbatch review`: the web app and its users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.cli.options import options

__all__ = ["audit", "review"]

review = typer.Typer(invoke_without_command=True, help="Work through the results in a browser; manage who may.")

audit = typer.Typer(no_args_is_help=True, help="What happened and who did it: the audit trail.")

Name = Annotated[str, typer.Argument(help="The name to log in with.")]


@review.callback()
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on; this machine alone by default.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one.")] = None,
    metrics: Annotated[
        str,
        typer.Option(help="HOST:PORT: serve /metrics, /healthz and /readyz. The setting `metrics` is not for review."),
    ] = "",
) -> None:
    """Open the work list in a browser; needs neither torch nor a model."""
    if context.invoked_subcommand is not None:
        return
    from cxrbatch.ops.review import run_review

    settings = options.settings(review_host=host, review_port=port)
    raise typer.Exit(run_review(settings, settings.review_host, settings.review_port, metrics))


@review.command("add-user")
def add_user(
    name: Name,
    admin: Annotated[bool, typer.Option("--admin", help="May also make rounds and adjudicate.")] = False,
) -> None:
    """Let somebody log in; asks for a password."""
    from cxrbatch.ops.review import new_user

    new_user(options.settings(), name, admin=admin)


@review.command("set-password")
def set_password(name: Name) -> None:
    """Change a password; open sessions of that user end."""
    from cxrbatch.ops.review import change_password

    change_password(options.settings(), name)


@review.command("disable-user")
def disable_user(
    name: Name, undo: Annotated[bool, typer.Option("--undo", help="Let the user log in again.")] = False
) -> None:
    """Let a user log in no more; nothing that they read is changed."""
    from cxrbatch.ops.review import close_user

    close_user(options.settings(), name, again=undo)


@review.command("users")
def users() -> None:
    """Who may log in."""
    from cxrbatch.ops.review import print_users

    print_users(options.settings())


@audit.command("export")
def export_audit(
    file: Annotated[Path, typer.Argument(help="FILE.csv or FILE.jsonl")],
    since: Annotated[str | None, typer.Option(help="Entries from this time on (ISO 8601, UTC).")] = None,
) -> None:
    """Every entry, oldest first: who saw, read and exported what, and what became of files."""
    from cxrbatch.ops.feedback import export_audit
    from cxrbatch.ops.results import moment_of
    from cxrbatch.ops.terminal import user_name

    export_audit(options.settings(), file, moment_of(since), user_name())
