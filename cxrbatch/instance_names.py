"""The file names that the receiver chooses. They never contain a UID, since a peer may put a path into it.

The first data set with a SOP Instance UID becomes `ab/abcdef….dcm`, from the SHA-256 of that UID. Another data set with
the same UID is stored beside it as `ab/abcdef…-0123….dcm`, with the SHA-256 of its content after the dash.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["duplicate_file_name", "file_name", "first_name_of"]

_UID_DIGITS, _CONTENT_DIGITS = 40, 16  # of a SHA-256 in hex
_DUPLICATE = re.compile(rf"(?:.*/)?[0-9a-f]{{2}}/([0-9a-f]{{{_UID_DIGITS}}})-[0-9a-f]{{{_CONTENT_DIGITS}}}\.dcm", re.S)


def file_name(sop_instance_uid: str) -> str:
    """`ab/abcdef….dcm`: the path of an instance below the folder."""
    digest = hashlib.sha256(sop_instance_uid.strip(" \0").encode("utf-8", "replace")).hexdigest()
    return f"{digest[:2]}/{digest[:_UID_DIGITS]}.dcm"


def duplicate_file_name(first: str, content_sha256: str) -> str:
    """The path of another data set with the same UID as `first` (a result of `file_name`)."""
    return f"{first.removesuffix('.dcm')}-{content_sha256[:_CONTENT_DIGITS]}.dcm"


def first_name_of(path: str) -> str | None:
    """The path of the first data set if `path` is one of `duplicate_file_name`; else None."""
    match = _DUPLICATE.fullmatch(path)
    return f"{path[: match.end(1)]}.dcm" if match else None
