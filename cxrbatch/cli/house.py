"""Housekeeping verbs: samples, doctor, `db …`, `config …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.cli.given import given

__all__ = ["app", "config", "db"]

app = typer.Typer()
db = typer.Typer(no_args_is_help=True, help="The store: upgrade, check, back up, prune.")
config = typer.Typer(no_args_is_help=True, help="The settings: what they are, and where each comes from.")


@app.command()
def samples(directory: Annotated[Path, typer.Argument(help="Made if it is not there.")]) -> None:
    """Write about two dozen synthetic files to try things on: phantom films, other pictures, broken files."""
    from cxrbatch.samples import write_samples

    written = write_samples(directory)
    print(f"{len(written)} synthetic files in {directory}; none of them shows a person.")


@app.command()
def doctor() -> None:
    """Check decoders, devices, bundles, store, disk and limits: one line each, with what to do."""
    from cxrbatch.ops.doctor import run_doctor

    raise typer.Exit(run_doctor(given.settings()))


@db.command("upgrade")
def db_upgrade(revision: Annotated[str, typer.Argument()] = "head") -> None:
    """Bring the store to this program's schema."""
    from cxrbatch.ops import database

    database.upgrade(given.settings().db, revision)


@db.command("downgrade")
def db_downgrade(revision: Annotated[str, typer.Argument(help="For example -1, or base.")]) -> None:
    """Take the store back to an older schema."""
    from cxrbatch.ops import database

    database.downgrade(given.settings().db, revision)


@db.command("current")
def db_current() -> None:
    """The store's revision, and the program's."""
    from cxrbatch.ops import database

    database.current(given.settings().db)


@db.command("check")
def db_check() -> None:
    """Integrity, foreign keys, schema."""
    from cxrbatch.ops import database

    raise typer.Exit(database.check(given.settings().db))


@db.command("backup")
def db_backup(file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """A consistent copy of a SQLite store, also while it is in use."""
    from cxrbatch.ops import database

    database.backup(given.settings().db, file)


@db.command("prune")
def db_prune(
    days: Annotated[int, typer.Option(min=0, help="Forget files that have been missing for so many days.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really do it; otherwise only say what would go.")] = False,
) -> None:
    """Forget files that are gone from their folder, and what only they needed."""
    from cxrbatch.ops import database

    database.prune(given.settings().db, days, really=yes)


@config.command("show")
def config_show() -> None:
    """Every setting, its value, and where the value comes from."""
    from cxrbatch.ops.settings_table import print_settings

    print_settings(given.settings(), given.config, {"db": given.db})


@config.command("check")
def config_check() -> None:
    """Read the settings and say whether they are usable; do nothing else."""
    given.settings()
    print("The settings are valid.")
