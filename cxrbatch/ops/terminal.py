"""Print to terminals and pipes."""

from __future__ import annotations

import getpass
import sys
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["Stderr", "plain", "tell", "to_stdout", "user_name"]

_WIDTH_OF_A_PIPE = 200  # columns


def to_stdout(*, markup: bool = False) -> Console:
    """A console on stdout that does not limit tables to 80 columns if stdout is a pipe.

    Without `markup`, a text is printed as it is: a file name may have [brackets] or :x: in it.
    """
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return _Console(highlight=False, markup=markup, emoji=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # as of any other print; rich would end the program with 1


class Stderr:
    """stderr, of which nobody need be left: its disk is full, or the terminal or the reader of the pipe is gone.

    The work does not end for want of a log, and the exit code stays that of the command.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tell(sentence: str, style: str = "") -> None:
    """Print a sentence on stderr, whatever is in it: rich would take [brackets] of a file name for markup."""
    Console(stderr=True).print(Text(plain(sentence), style), soft_wrap=True)


def plain(text: str) -> str:
    """Untrusted text as one line without control characters: safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def user_name() -> str:
    """The user of this machine, for the audit trail."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "local"
