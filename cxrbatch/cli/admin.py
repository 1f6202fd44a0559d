"""Administration commands: samples, doctor, `db …`, `config …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.cli.options import options
from cxrbatch.errors import ExitCode, Fatal

__all__ = ["app", "config", "db"]

app = typer.Typer()
db = typer.Typer(no_args_is_help=True, help="The store: upgrade, check, back up, prune.")
config = typer.Typer(no_args_is_help=True, help="The settings: what they are, and where each comes from.")
_INCLUDE_REVIEWED = (
    "Also contents that readers have reviewed, with their reviews and their places in closed rounds; "
    "open rounds keep theirs, and audit, which is never deleted, says how many reviews went."
)


@app.command()
def samples(directory: Annotated[Path, typer.Argument(help="Made if it is not there.")]) -> None:
    """Write about two dozen synthetic files to try things on: phantom images, other images, broken files."""
    from cxrbatch.samples import write_samples

    written = write_samples(directory)
    print(f"{len(written)} synthetic files in {directory}; none of them shows a person.")


@app.command()
def doctor() -> None:
    """Check decoders, devices, bundles, store, disk and limits: one line each, with what to do."""
    from cxrbatch.ops.doctor import run_doctor

    raise typer.Exit(run_doctor(options.settings()))


@db.command("upgrade")
def db_upgrade(revision: Annotated[str, typer.Argument(help="The newest by default.")] = "head") -> None:
    """Upgrade the store to this program's schema."""
    from cxrbatch.ops import database

    database.upgrade(options.settings().db, revision)


# Click takes -1 for an option unless unknown ones are arguments.
@db.command("downgrade", context_settings={"ignore_unknown_options": True})
def db_downgrade(
    revision: Annotated[str, typer.Argument(help="For example -1, or base.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really do it.")] = False,
) -> None:
    """Downgrade the store to an older schema. What that has no place for is lost: of `base`, everything."""
    from cxrbatch.ops import database

    if not yes:
        raise Fatal(
            f"What the schema {revision} has no place for is lost, results and reviews too: make a copy first "
            "(`cxrbatch db backup FILE`, pg_dump), then add --yes.",
            ExitCode.USAGE,
        )
    database.downgrade(options.settings().db, revision)


@db.command("current")
def db_current() -> None:
    """The store's revision, and the program's."""
    from cxrbatch.ops import database

    database.current(options.settings().db)


@db.command("check")
def db_check() -> None:
    """Integrity, foreign keys, schema."""
    from cxrbatch.ops import database

    raise typer.Exit(database.check(options.settings().db))


@db.command("backup")
def db_backup(file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """A consistent copy of a SQLite store, also while it is in use."""
    from cxrbatch.ops import database

    database.backup(options.settings().db, file)


@db.command("prune")
def db_prune(
    days: Annotated[
        int | None,
        typer.Option(min=0, max=36_500, help="Forget what has been gone for so many days; else retention_days."),
    ] = None,
    include_reviewed: Annotated[bool, typer.Option("--include-reviewed", help=_INCLUDE_REVIEWED)] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Really do it; otherwise only say what would go.")] = False,
) -> None:
    """Delete rows of files that are gone from their folder and of contents that were overwritten."""
    from cxrbatch.ops import database

    settings = options.settings()
    if days is None and settings.retention_days == 0:
        raise Fatal("retention_days is 0, so nothing is forgotten: set it, or say --days.", ExitCode.USAGE)
    days = settings.retention_days if days is None else days
    database.prune(settings.db, days, really=yes, include_reviewed=include_reviewed)


@config.command("show")
def config_show() -> None:
    """Every setting, its value, and where the value comes from."""
    from cxrbatch.ops.settings_table import print_settings

    print_settings(options.settings(), options.config, {"db": options.db})


@config.command("check")
def config_check() -> None:
    """Read the settings and report whether they are valid; do nothing else."""
    from cxrbatch.ops.settings_table import check_settings

    check_settings(options.settings())
    print("The settings are valid.")
