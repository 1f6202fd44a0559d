"""The entry point of both `python -m cxrbatch` and `cxrbatch`.

A spawned decode process imports the main file of its parent but needs no command line, so nothing else is imported at
the top of this file.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """The command line."""
    from cxrbatch.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
