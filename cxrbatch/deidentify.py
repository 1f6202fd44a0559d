"""Hash, keep or drop identifiers from DICOM files. Needs no DICOM library: the parent process does not load one."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal

__all__ = ["Identifiers"]


@dataclass(frozen=True, slots=True)
class Identifiers:
    """Whether PatientID and AccessionNumber are hashed with a key, kept or dropped.

    UIDs identify objects, not people, and are needed to find an image in a PACS: `hash` and `keep` keep them and the
    study date, `drop` drops them too. Names and birth dates are never read, in any mode.
    """

    mode: Literal["hash", "keep", "drop"] = "hash"
    key: bytes = b""

    def __repr__(self) -> str:
        return f"Identifiers(mode={self.mode!r})"

    def protect(self, identifier: str) -> str:
        """In mode `hash`, the first 32 hex digits (128 bits) of the HMAC-SHA256."""
        if not identifier or self.mode == "drop":
            return ""
        if self.mode == "keep":
            return identifier
        return hmac.new(self.key, identifier.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]
