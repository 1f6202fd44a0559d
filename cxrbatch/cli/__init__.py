"""The command line: one thin command per verb, no logic. Heavy modules are imported inside the commands."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from cxrbatch import __version__
from cxrbatch.cli import admin, models, operate, run, sending
from cxrbatch.cli.options import options
from cxrbatch.cli.review import audit, review
from cxrbatch.errors import ExitCode, Fatal, StoreDown
from cxrbatch.ops.terminal import Stderr, plain

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Chest X-rays in, one accountable row each out. For research; decision support only, not a diagnosis.",
)
app.add_typer(run.app)
app.add_typer(sending.app)
app.add_typer(models.app)
app.add_typer(admin.app)
app.add_typer(operate.app)
app.add_typer(models.models, name="models")
app.add_typer(sending.outbox, name="outbox")
app.add_typer(review, name="review")
app.add_typer(audit, name="audit")
app.add_typer(admin.db, name="db")
app.add_typer(admin.config, name="config")


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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    options.config, options.db, options.quiet = config, db, quiet
    options.verbose, options.log_format = verbose, log_format


#: What the extras of pyproject.toml bring.
_EXTRAS = {
    "matplotlib": "train",
    "sklearn": "train",
    **dict.fromkeys(("highdicom", "dicomweb_client"), "dicom"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "jinja2", "argon2", "python_multipart"), "review"),
}


#: Options by which nothing is listened on, whatever the settings say.
_MAY_BE_EMPTY = frozenset({"listen", "metrics"})


def main() -> None:
    """The entry point: Fatal becomes one sentence on stderr and its exit code."""
    _provide_streams()
    code = _run()
    try:
        sys.stdout.flush()  # here, where a full disk can still be reported
    except BrokenPipeError:
        _drop_standard_output()
    except OSError as error:
        code = _not_whole(error)
    sys.exit(code)


def _run() -> int | str | None:
    """The exit code of the command. typer itself raises SystemExit when it ends."""
    program = _guarded(typer.main.get_command(app))
    try:
        program()
    except SystemExit as end:
        option = getattr(end.__context__, "option_name", None)  # of the usage error that typer has printed
        if any(option in parameter.opts for parameter in program.params):
            _complain(f"{option} stands before the command: cxrbatch {option} … COMMAND.")
        # typer says 1 of each broken pipe, but `cxrbatch results | head` has all that it wants.
        return ExitCode.OK if isinstance(end.__context__, BrokenPipeError) and _nobody_reads() else end.code
    except Fatal as fatal:
        _complain(str(fatal))
        return fatal.exit_code
    except StoreDown as down:
        _complain(f"{str(down).rstrip('.')}. Start it, wait for it, or name another store with --db.")
    except ModuleNotFoundError as missing:
        extra = _EXTRAS.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        _complain(f"This command needs an extra: pip install 'cxrbatch[{extra}]'.")
    except MemoryError:
        _complain("There is not enough memory; what is committed is kept, and the same command goes on from there.")
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except OSError as error:  # an output folder that is missing, full or not writable
        if error.filename is not None:
            _complain(f"{error.filename} cannot be used ({error.strerror}): check it, or name another.")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return _not_whole(error)
        else:
            raise
    return ExitCode.FATAL


def _guarded(command: Any) -> Any:
    """`command`, whose options and arguments, and those of its commands, refuse an empty text."""
    for parameter in command.params:
        parameter.process_value = partial(_refuse_empty, parameter.process_value, parameter)
    for below in getattr(command, "commands", {}).values():
        _guarded(below)
    return command


def _refuse_empty(process: Callable[..., Any], parameter: Any, context: Any, value: Any) -> Any:
    """An empty path is the working folder to pathlib, an empty host every address of this machine to a socket."""
    if "" in (value if isinstance(value, list | tuple) else [value]) and parameter.name not in _MAY_BE_EMPTY:
        is_option = parameter.param_type_name == "option"
        name = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
        else_ = "name it, or write . for this folder" if parameter.required else "give it a value, or leave it out"
        raise Fatal(f"{name} is empty (an unset variable of a script?): {else_}.", ExitCode.USAGE)
    return process(context, value)


def _provide_streams() -> None:
    """A stream that is closed becomes /dev/null: the next file to be opened would take its place.

    What the encoding of stdout does not have is printed as an escape: in UTF-8, a file name that is none.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, Stderr(sys.stderr))


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return bool(stdout.poll(0))


def _not_whole(error: OSError) -> ExitCode:
    _drop_standard_output()
    _complain(f"What was to be printed or written is not whole ({error.strerror}): make room for it.")
    return ExitCode.FATAL


def _drop_standard_output() -> None:
    """Discard what is left in the buffer of stdout, so that the end of the process causes no further error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(sentence: str) -> None:
    text = Text.assemble(("cxrbatch: ", "red"), plain(sentence))
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
