"""The HMAC key for hashing patient IDs and accession numbers."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import Fatal
from cxrbatch.failpoints import failpoint
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.connection import store_file

__all__ = ["identifiers_of", "key_file_of"]

_KEY_BYTES = 32
_MOST_KEY_BYTES = 4096


def key_file_of(settings: Settings) -> Path:
    """The path of the key. A relative id_key_file is relative to a SQLite store's folder, not the working folder."""
    store = store_file(settings.db)
    return ((store.parent if store else Path()) / settings.id_key_file).absolute()


def identifiers_of(settings: Settings, store: Store | None = None) -> Identifiers:
    """The treatment of identifiers by the settings. Creates the key file (mode 0600) if it is missing.

    Raises Fatal if the key file is unusable, or is missing although `store` holds hashes: with a new key, old and new
    hashes would differ silently.
    """
    if settings.phi != "hash":
        return Identifiers(mode=settings.phi)
    path = key_file_of(settings)
    try:
        if not path.exists():
            if store is not None and store.holds_identifiers():
                raise Fatal(
                    f"The key file {path} is missing, and the store holds hashes made with it: restore it (before "
                    "0.2.0 it lay in the working folder), or set id_key_file."
                )
            _make(path)
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be made ({error.strerror}); set id_key_file.") from None
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Fatal(f"The key file {path} is not a regular file; set id_key_file.")
            key = file.read(_MOST_KEY_BYTES + 1)
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be read ({error.strerror}): let this user read it.") from None
    if len(key) < _KEY_BYTES:
        raise Fatal(f"The key file {path} holds fewer than {_KEY_BYTES} bytes; restore it, or remove it for a new one.")
    if len(key) > _MOST_KEY_BYTES:
        raise Fatal(f"The key file {path} is no key: it holds more than {_MOST_KEY_BYTES} bytes; set id_key_file.")
    return Identifiers(mode="hash", key=key)


def _make(path: Path) -> None:
    """Create the key file atomically, even if several programs start at once or are killed here."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        failpoint("start.key_written")
        with suppress(FileExistsError):  # another program was first: its key is used
            os.link(beside, path)
    finally:
        beside.unlink()
