"""Printing to people and to pipes."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["plain", "to_stdout"]

_WIDTH_OF_A_PIPE = 200  # columns; nobody folds lines there


def to_stdout() -> Console:
    """A console on stdout that does not squeeze tables into 80 columns when it is a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)


def plain(text: str) -> str:
    """Text of outside origin as one line without control characters: safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
