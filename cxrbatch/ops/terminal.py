"""Print to terminals and pipes."""

from __future__ import annotations

import getpass
import sys

from rich.console import Console

__all__ = ["plain", "to_stdout"]

_WIDTH_OF_A_PIPE = 200  # columns


def to_stdout() -> Console:
    """A console on stdout that does not limit tables to 80 columns if stdout is a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)


def plain(text: str) -> str:
    """Untrusted text as one line without control characters: safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def user_name() -> str:
    """The user of this machine, for the audit trail."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "local"
