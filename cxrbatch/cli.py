"""The command line: one thin command a verb, no logic. What is heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from cxrbatch import __version__
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.settings import Settings, load_settings

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Chest X-rays in, one accountable row each out. For research; decision support only, not a diagnosis.",
)
models = typer.Typer(no_args_is_help=True, help="The bundles that score: list, show, verify.")
db = typer.Typer(no_args_is_help=True, help="The store: upgrade, check, back up, prune.")
config = typer.Typer(no_args_is_help=True, help="The settings: what they are, and where each comes from.")
app.add_typer(models, name="models")
app.add_typer(db, name="db")
app.add_typer(config, name="config")


@dataclass
class _Global:
    config: Path | None = None
    db: str | None = None
    quiet: bool = False
    verbose: bool = False
    log_format: str | None = None

    def settings(self, **flags: Any) -> Settings:
        return load_settings(self.config, {"db": self.db, "log_format": self.log_format, **flags})


_given = _Global()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cxrbatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (TOML).")] = None,
    db: Annotated[str | None, typer.Option("--db", help="Store: sqlite:///FILE or postgresql+psycopg://…")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no closing table.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    log_format: Annotated[str | None, typer.Option("--log-format", help="console or json")] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    _given.config, _given.db, _given.quiet = config, db, quiet
    _given.verbose, _given.log_format = verbose, log_format


@app.command()
def scan(
    paths: Annotated[list[Path], typer.Argument(help="Folders and files to read; nothing in them is changed.")],
    csv: Annotated[str | None, typer.Option(help="Write the rows of these paths to this file; - is stdout.")] = None,
    jsonl: Annotated[str | None, typer.Option(help="The same as JSON lines.")] = None,
    parquet: Annotated[str | None, typer.Option(help="The same as Parquet (needs the extra 'parquet').")] = None,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0,1")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, torch or openvino")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in one pass of the networks.")] = None,
    workers: Annotated[int | None, typer.Option(help="Decode processes; 0 is one a core.")] = None,
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

    settings = _given.settings(
        cascade=cascade,
        device=device,
        engine=engine,
        batch_size=batch_size,
        workers=workers,
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
        quiet=_given.quiet,
    )
    raise typer.Exit(code)


@app.command()
def watch(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders to watch; nothing in them is changed.")],
    once: Annotated[bool, typer.Option("--once", help="End when everything that is there has its outcome.")] = False,
    quiet_s: Annotated[float | None, typer.Option("--quiet", help="A file is whole after so many still seconds.")] = None,
    rescan_s: Annotated[float | None, typer.Option("--rescan", help="Seconds between two walks.")] = None,
    poll: Annotated[str | None, typer.Option(help="auto, always or never: walk often instead of trusting events")] = None,
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT: also receive by DICOM C-STORE into DIR.")] = None,
    cascade: Annotated[str | None, typer.Option(help="A shipped bundle's name, or a bundle's folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:0,1")] = None,
    workers: Annotated[int | None, typer.Option(help="Decode processes; 0 is one a core.")] = None,
) -> None:
    """The daemon: every file that comes to stand still in a folder becomes one row, through crashes and dropped shares."""
    from cxrbatch.ops.watch import run_watch

    flags = {"quiet_s": quiet_s, "rescan_s": rescan_s, "poll": poll, "listen": listen}
    flags |= {"cascade": cascade, "device": device, "workers": workers}
    code = run_watch(lambda: _given.settings(**flags), folders, once=once, verbose=_given.verbose)
    raise typer.Exit(code)


@app.command()
def receive(
    folder: Annotated[Path, typer.Argument(help="Where to put what is sent, for `cxrbatch watch` to find.")],
    listen: Annotated[str | None, typer.Option(help="[AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112")] = None,
) -> None:
    """The DICOM receiver alone (C-ECHO and C-STORE): what is acknowledged is on the disk."""
    from cxrbatch.ops.receive import run_receive

    run_receive(_given.settings(listen=listen), folder, verbose=_given.verbose)


@app.command()
def retry(
    reason: Annotated[str | None, typer.Option(help="Only files with this reason code, e.g. truncated.")] = None,
) -> None:
    """Let files that failed be tried again, by the watch that is running or the next scan."""
    from cxrbatch.ops.results import retry_failed

    retry_failed(_given.settings(), reason)


@app.command()
def results(
    label: Annotated[str | None, typer.Option(help="Only this label, e.g. COVID19.")] = None,
    min_confidence: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    needs_review: Annotated[bool, typer.Option("--needs-review", help="Only what a person should look at.")] = False,
    since: Annotated[str | None, typer.Option(help="Processed at or after this time (ISO 8601, UTC).")] = None,
    under: Annotated[Path | None, typer.Option(help="Only files in this folder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    format: Annotated[Literal["table", "csv", "jsonl"], typer.Option(help="How to print them.")] = "table",
) -> None:
    """The rows of the store, without SQL."""
    from cxrbatch.ops.results import print_results

    print_results(
        _given.settings(),
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

    export_results(_given.settings(), file, under)


@app.command()
def show(what: Annotated[str, typer.Argument(help="A file's path, or the SHA-256 of its content.")]) -> None:
    """All that is known of one film: how it was read, every number, what made it, its history."""
    from cxrbatch.ops.results import show_one

    show_one(_given.settings(), what)


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

    raise typer.Exit(run_doctor(_given.settings()))


@models.command("list")
def models_list() -> None:
    """The shipped bundles."""
    from cxrbatch.ops.models import list_models

    list_models()


@models.command("show")
def models_show(name: Annotated[str, typer.Argument(help="A shipped bundle's name, or a folder.")]) -> None:
    """A bundle's stages, thresholds, hashes and card."""
    from cxrbatch.ops.models import show_model

    show_model(name)


@models.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(help="A bundle; all the shipped ones when left out.")] = None,
) -> None:
    """Recompute every hash, and score synthetic planes against the recorded logits."""
    from cxrbatch.ops.models import verify_models

    raise typer.Exit(verify_models(name, _given.settings()))


@db.command("upgrade")
def db_upgrade(revision: Annotated[str, typer.Argument()] = "head") -> None:
    """Bring the store to this program's schema."""
    from cxrbatch.ops import database

    database.upgrade(_given.settings().db, revision)


@db.command("downgrade")
def db_downgrade(revision: Annotated[str, typer.Argument(help="For example -1, or base.")]) -> None:
    """Take the store back to an older schema."""
    from cxrbatch.ops import database

    database.downgrade(_given.settings().db, revision)


@db.command("current")
def db_current() -> None:
    """The store's revision, and the program's."""
    from cxrbatch.ops import database

    database.current(_given.settings().db)


@db.command("check")
def db_check() -> None:
    """Integrity, foreign keys, schema."""
    from cxrbatch.ops import database

    raise typer.Exit(database.check(_given.settings().db))


@db.command("backup")
def db_backup(file: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """A consistent copy of a SQLite store, also while it is in use."""
    from cxrbatch.ops import database

    database.backup(_given.settings().db, file)


@db.command("prune")
def db_prune(
    days: Annotated[int, typer.Option(min=0, help="Forget files that have been missing for so many days.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really do it; otherwise only say what would go.")] = False,
) -> None:
    """Forget files that are gone from their folder, and what only they needed."""
    from cxrbatch.ops import database

    database.prune(_given.settings().db, days, really=yes)


@config.command("show")
def config_show() -> None:
    """Every setting, its value, and where the value comes from."""
    from cxrbatch.ops.settings_table import print_settings

    print_settings(_given.settings(), _given.config, {"db": _given.db})


@config.command("check")
def config_check() -> None:
    """Read the settings and say whether they are usable; do nothing else."""
    _given.settings()
    print("The settings are valid.")


def main() -> None:
    """The entry point: Fatal becomes one sentence on stderr and its exit code."""
    try:
        app()
    except Fatal as fatal:
        Console(stderr=True).print(f"[red]cxrbatch:[/red] {_plain(str(fatal))}", highlight=False, soft_wrap=True)
        sys.exit(fatal.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `cxrbatch results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)


def _plain(text: str) -> str:
    """Text of outside origin, safe for a terminal: no markup, no control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("[", r"\[")
