"""Files of received instances: compare with an existing file, and write a new one atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pynetdicom.events import Event

from cxrbatch.failpoints import failpoint

__all__ = ["NameLocks", "ReceivedInstance", "is_empty_file", "sync_folder", "write_new"]

_GROUP_LENGTH_END = 144  # bytes: preamble, "DICM", the element (0002,0000)
_TRANSFER_SYNTAX_TAG = b"\x02\0\x10\0UI"
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class ReceivedInstance:
    """A DICOM data set as a peer sent it."""

    file_content: bytes  # with preamble and file meta information
    data_set: memoryview  # the rest of file_content
    transfer_syntax: bytes  # the element (0002,0010)
    sha256: str  # of transfer syntax and data set, the part that the sender determines

    @classmethod
    def of(cls, event: Event) -> ReceivedInstance:
        content = event.encoded_dataset()
        start = _data_set_start(content)
        meta, data_set = content[:start], memoryview(content)[start:]
        at = meta.find(_TRANSFER_SYNTAX_TAG)
        length = int.from_bytes(meta[at + 6 : at + 8], "little") if at >= 0 else 0
        syntax = meta[at : at + 8 + length] if at >= 0 else b""
        return cls(content, data_set, syntax, hashlib.sha256(syntax + b"\0" + data_set).hexdigest())

    def is_in(self, path: Path) -> bool:
        """Whether `path` is a regular file with this data set and transfer syntax; file meta data may differ."""
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(info.st_mode) or not info.st_size:
            return False
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            start = _data_set_start(file.read(_GROUP_LENGTH_END))
            if info.st_size != start + len(self.data_set):
                return False
            file.seek(0)
            if self.transfer_syntax not in file.read(start):
                return False
            at = 0
            while chunk := file.read(_CHUNK):
                if self.data_set[at : at + len(chunk)] != chunk:
                    return False
                at += len(chunk)
            return at == len(self.data_set)


def write_new(content: bytes, final: Path) -> None:
    """Write a file that is on disk before it gets its name; the caller flushes the folder.

    Raises FileExistsError if the name is taken, except by an empty file, which is replaced.
    """
    temporary = final.parent / f".{secrets.token_hex(8)}.part"  # walks ignore this name
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            failpoint("receiver.written")
            file.flush()
            os.fsync(file.fileno())
        failpoint("receiver.synced")
        if is_empty_file(final):
            temporary.rename(final)
        else:
            _link_or_rename(temporary, final)
    finally:
        with suppress(OSError):
            temporary.unlink()
    failpoint("receiver.renamed")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NameLocks:
    """Locks by name: if two associations send the same instance at once, the second waits and finds the file."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        with self._changed:
            while name in self._busy:
                self._changed.wait()
            self._busy.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(name)
                self._changed.notify_all()


def _data_set_start(content: bytes) -> int:
    """The offset in bytes of the data set after preamble, prefix and file meta information; 0 without them."""
    if content[128:132] != b"DICM" or content[132:140] != b"\x02\0\0\0UL\x04\0":
        return 0
    return _GROUP_LENGTH_END + int.from_bytes(content[140:_GROUP_LENGTH_END], "little")


def is_empty_file(path: Path) -> bool:
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size == 0


def _link_or_rename(temporary: Path, final: Path) -> None:
    """Give the file its name: by link, which (unlike a rename) never replaces another receiver's file."""
    try:
        os.link(temporary, final)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        temporary.rename(final)  # a file system without hard links
