"""The exclusive writer lock: one program at a time scores into a SQLite store.

It is an flock on a file beside the store, not the file's existence: the kernel releases it when the process ends in
any way, so no stale lock is left. Postgres needs no lock: there, leases share the work.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store.connection import store_file

__all__ = ["LOCK_SUFFIX", "only_writer"]

LOCK_SUFFIX = ".lock"


@contextmanager
def only_writer(url: str) -> Iterator[None]:
    """Hold the writer lock of the store `url` until the block ends; does nothing on Postgres.

    Raises Fatal (exit 11) if another program holds it, and Fatal (exit 1) if the lock file cannot be created.
    """
    file = store_file(url)
    if file is None:
        yield
        return
    store = os.path.realpath(file)
    lock, folder = store + LOCK_SUFFIX, os.path.dirname(store)
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if os.path.lexists(lock):  # made by another user, such as root in a first trial
            raise Fatal(f"The lock file {lock} cannot be written ({error.strerror}): let this user write it.") from None
        raise Fatal(
            f"The folder {folder} of the store cannot be written ({error.strerror}): make it or change its "
            "permissions, or name another store with --db."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another program"
            raise Fatal(
                f"The store {store} is in use by a scan or a watch ({who}): wait for it or stop it, or use Postgres, "
                "which several may share.",
                ExitCode.STORE_IN_USE,
            ) from None
        except OSError as error:
            raise Fatal(f"The file system of {store} cannot lock files ({error.strerror}); use a local disk.") from None
        with suppress(OSError):  # the process ID is only informative; the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock
