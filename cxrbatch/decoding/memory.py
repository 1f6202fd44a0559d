"""How much memory this machine or container has, and how much of it one decode worker may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["memory_limit_mib", "worker_memory_mib"]

_SHARE = 0.75  # of the memory for all decode workers together; the rest is for the networks and the file cache
_LEAST_MIB, _MOST_MIB = 1536, 4096  # a 100-megapixel 16-bit image needs about 1,500


def worker_memory_mib(workers: int, limit_mib: int | None = None) -> int:
    """The address-space limit in MiB of each of `workers` decode processes, when worker_memory_mib is 0."""
    limit = memory_limit_mib() if limit_mib is None else limit_mib
    return max(_LEAST_MIB, min(_MOST_MIB, int(limit * _SHARE / max(workers, 1))))


def memory_limit_mib(root: Path = Path("/")) -> int:
    """Physical memory in MiB, or the cgroup's limit if lower (cgroup v2: memory.max, v1: limit_in_bytes)."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = root / "sys/fs/cgroup"
    for file in (*_of_group(root, folder, "memory.max"), *_of_group(root, folder / "memory", "memory.limit_in_bytes")):
        try:
            limit = min(limit, int(file.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return limit // 2**20


def _of_group(root: Path, mount: Path, name: str) -> list[Path]:
    """The limit files from the mount point down to this process's group; each of them applies."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    controllers = "memory" if name == "memory.limit_in_bytes" else ""
    groups = [line.split(":", 2)[2] for line in lines if controllers in line.split(":", 2)[1].split(",")]
    files = [mount / name]
    for group in groups:
        below = mount
        for part in Path(group).parts[1:]:
            below = below / part
            files.append(below / name)
    return files
