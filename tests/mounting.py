"""Real mounts for tests; skipped where they are not allowed (they need root)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["bind", "tmpfs", "unmount"]


def bind(folder: Path, there: Path) -> None:
    """Bind-mount `folder` at `there`."""
    _mount("--bind", folder, there)


@contextmanager
def tmpfs(folder: Path) -> Iterator[Path]:
    """An empty file system of 2 MiB at `folder` until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", "size=2m", "none", folder)
    try:
        yield folder
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """Unmount whatever is mounted at `folder`."""
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def _mount(*args: object) -> None:
    done = subprocess.run(["mount", *map(str, args)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
