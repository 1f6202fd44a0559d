"""The HMAC key that patient IDs and accession numbers are hashed with."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cxrbatch.crash import crash_point
from cxrbatch.dicom.identifiers import Identifiers
from cxrbatch.errors import Fatal
from cxrbatch.settings import Settings

__all__ = ["identifiers_of"]

_KEY_BYTES = 32


def identifiers_of(settings: Settings) -> Identifiers:
    """What the settings want done with identifiers. Makes the key file (mode 0600) where it is missing.

    Raises Fatal when the key file is unusable: a key made anew would make old and new hashes differ, silently.
    """
    if settings.phi != "hash":
        return Identifiers(mode=settings.phi)
    path = Path(settings.id_key_file)
    try:
        if not path.exists():
            _make(path)
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be made ({error.strerror}); set id_key_file.") from None
    try:
        key = path.read_bytes()
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be read ({error.strerror}); set id_key_file.") from None
    if len(key) < _KEY_BYTES:
        raise Fatal(f"The key file {path} holds fewer than {_KEY_BYTES} bytes; restore it, or remove it for a new one.")
    return Identifiers(mode="hash", key=key)


def _make(path: Path) -> None:
    """A new key under its name, whole or not at all, however many programs start at once or are killed here."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        crash_point("start.key_written")
        with suppress(FileExistsError):  # another program was first: its key is the one
            os.link(beside, path)
    finally:
        beside.unlink()
