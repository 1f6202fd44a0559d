"""`python -m cxrbatch` is `cxrbatch`: both begin here.

A decode process imports the file that its parent was started from, and needs no command line: nothing else is
imported up here.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """The command line."""
    from cxrbatch.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
