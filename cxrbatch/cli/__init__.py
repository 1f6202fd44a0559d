"""The command line: one thin command a verb, no logic. What is heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cxrbatch import __version__
from cxrbatch.cli import films, house, models
from cxrbatch.cli.given import given
from cxrbatch.errors import ExitCode, Fatal, StoreDown

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Chest X-rays in, one accountable row each out. For research; decision support only, not a diagnosis.",
)
app.add_typer(films.app)
app.add_typer(models.app)
app.add_typer(house.app)
app.add_typer(models.models, name="models")
app.add_typer(house.db, name="db")
app.add_typer(house.config, name="config")


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
    given.config, given.db, given.quiet = config, db, quiet
    given.verbose, given.log_format = verbose, log_format


#: What the extras of pyproject.toml bring.
_EXTRAS = {"matplotlib": "train", "sklearn": "train"}


def main() -> None:
    """The entry point: Fatal becomes one sentence on stderr and its exit code."""
    try:
        app()
    except Fatal as fatal:
        _complain(str(fatal))
        sys.exit(fatal.exit_code)
    except StoreDown as down:
        _complain(f"{str(down).rstrip('.')}. Start it, or name another store with --db.")
        sys.exit(ExitCode.FATAL)
    except ModuleNotFoundError as missing:
        extra = _EXTRAS.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        _complain(f"This command needs an extra: pip install 'cxrbatch[{extra}]'.")
        sys.exit(ExitCode.FATAL)
    except MemoryError:
        _complain("There is not enough memory; what is committed is kept, and the same command goes on from there.")
        sys.exit(ExitCode.FATAL)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `cxrbatch results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except OSError as error:  # a folder to write to that is not there, full or somebody else's
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}.")
        sys.exit(ExitCode.FATAL)


def _complain(sentence: str) -> None:
    from cxrbatch.ops.terminal import plain

    text = Text.assemble(("cxrbatch: ", "red"), plain(sentence))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
