"""The HMAC key that patient IDs and accession numbers are hashed with."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

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
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be made ({error.strerror}); set id_key_file.") from None
    else:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
    try:
        key = path.read_bytes()
    except OSError as error:
        raise Fatal(f"The key file {path} cannot be read ({error.strerror}); set id_key_file.") from None
    if len(key) < _KEY_BYTES:
        raise Fatal(f"The key file {path} holds fewer than {_KEY_BYTES} bytes; restore it, or remove it for a new one.")
    return Identifiers(mode="hash", key=key)
