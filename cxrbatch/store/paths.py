r"""Convert file names to text that both databases can store, and back.

A POSIX name is bytes. `os.fsdecode` turns undecodable bytes into lone surrogates, which neither SQLite nor Postgres
can store. So:

* a path without surrogates and without the two characters `\x` is stored as it is;
* in any other path, backslashes are doubled and each undecodable byte is written `\xNN`. Such a text always contains
  `\x`, and the first kind never does: no two paths have the same text. NUL, which databases do not store and which only
  keys of buckets have, is written in the same way.

A text over 2,400 bytes of UTF-8 is cut and ends in `\x#` and its own sha256 (a Postgres index entry holds at most
2,704 bytes). It stays unique, but cannot be converted back to the path.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

__all__ = ["CUT_MARK", "LONGEST", "TextRange", "path_to_text", "plain", "text_to_path", "under"]

LONGEST = 2400  # bytes of UTF-8
CUT_MARK = "\\x#"
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_ESCAPE = re.compile(r"\\\\|\\x([0-9a-f]{2})")


def path_to_text(path: str) -> str:
    """The text under which a path (as `os.fsdecode` gives it) is stored.

    Raises ValueError for surrogates that `os.fsdecode` never makes.
    """
    if path.isascii() and len(path) <= LONGEST and "\\x" not in path and "\0" not in path:
        return path  # the usual case, which must be fast: a scan calls this twice per file
    text = _escaped(path) if "\\x" in path or _UNSTORABLE.search(path) else path
    if 4 * len(text) > LONGEST and len(encoded := text.encode()) > LONGEST:
        digest = hashlib.sha256(encoded).hexdigest()
        head = encoded[: LONGEST - len(CUT_MARK) - len(digest)].decode(errors="ignore")
        return head + CUT_MARK + digest
    return text


def text_to_path(text: str) -> str:
    """The path (with surrogates, for `os.fsencode`) that is stored as `text`.

    Raises ValueError for a text that was cut.
    """
    if "\\x" not in text:
        return text
    if CUT_MARK in text:
        raise ValueError("this path was too long to be kept whole")
    return _ESCAPE.sub(_unescaped, text)


class TextRange(NamedTuple):
    """Stored texts `low <= text < high`; where `escaped` is not None, only those with (without) `\\x`."""

    low: str
    high: str
    escaped: bool | None


def under(folder: str) -> list[TextRange]:
    """The ranges of stored texts that are exactly the paths below `folder`: two where it has backslashes.

    A name below a folder `a\\b` may or may not be escaped, and is stored below `a\\\\b` if so.
    """
    prefix = folder.rstrip("/") + "/"
    doubled = _escaped(prefix)
    if doubled == prefix:
        return [TextRange(prefix, _after(prefix), None)]
    ranges = [TextRange(doubled, _after(doubled), True)]
    if path_to_text(prefix) == prefix:
        ranges.append(TextRange(prefix, _after(prefix), False))
    return ranges


def plain(text: str, longest: int = 1000) -> str:
    """Text from a file's header, made storable: no NUL, no surrogates, at most `longest` characters."""
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    if "\0" in text or not text.isascii():
        text = _SURROGATE.sub("\ufffd", text.replace("\0", "\ufffd"))
    return text


def _after(prefix: str) -> str:
    return prefix[:-1] + chr(ord("/") + 1)


def _escaped(path: str) -> str:
    return _UNSTORABLE.sub(_escape_byte, path.replace("\\", "\\\\"))


def _escape_byte(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code and not 0xDC80 <= code <= 0xDCFF:
        raise ValueError("a surrogate that os.fsdecode never makes")
    return f"\\x{code & 0xFF:02x}"


def _unescaped(match: re.Match[str]) -> str:
    if match[1] is None:
        return "\\"
    byte = int(match[1], 16)
    return chr(0xDC00 + byte) if byte else "\0"
