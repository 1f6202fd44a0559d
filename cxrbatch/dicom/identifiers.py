"""What becomes of identifiers on their way out of a DICOM file. Needs no DICOM library: the parent process has none."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal

__all__ = ["Identifiers"]


@dataclass(frozen=True, slots=True)
class Identifiers:
    """What becomes of PatientID and AccessionNumber: a keyed hash, themselves, or nothing.

    UIDs name objects, not people, and are what a PACS is joined by: `hash` and `keep` keep them as they
    are, `drop` drops them too. Names and birth dates are never read, whatever the mode.
    """

    mode: Literal["hash", "keep", "drop"] = "hash"
    key: bytes = b""

    def __repr__(self) -> str:
        return f"Identifiers(mode={self.mode!r})"

    def protect(self, identifier: str) -> str:
        """HMAC-SHA256, the first 32 hex digits (128 bits) of it, in mode `hash`."""
        if not identifier or self.mode == "drop":
            return ""
        if self.mode == "keep":
            return identifier
        return hmac.new(self.key, identifier.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]
