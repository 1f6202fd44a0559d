"""Files on a server that fsspec knows, by `sftp://user@host/folder` and the like, listed a folder at a time.

Credentials are fsspec's settings in the environment (FSSPEC_SFTP_USERNAME, FSSPEC_SFTP_KEY_FILENAME, ...). Unlike an
object, such a file grows while it is written, and its version is mostly the time of its last change.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cxrbatch.errors import Fatal
from cxrbatch.intake.object_stores import Object, changed

__all__ = ["FileServer"]

T = TypeVar("T")
_VERSIONS = ("ETag", "etag", "version_id", "generation")
_TIMES = ("mtime", "modified", "last_modified", "LastModified", "modify", "modificationTime")
_FAILED = "\0failed"  # below the folders that are still to list: one of those before could not be listed


class FileServer:
    """One server. Its methods are those of object_stores.Store; an error closes its connection, the next call opens it.

    Raises ValueError for a scheme that fsspec does not know, ImportError where its library is not installed.
    """

    def __init__(self, scheme: str, host: str) -> None:
        import fsspec

        self._scheme, self._url = scheme, f"{scheme}://{host}"
        self._class = fsspec.get_filesystem_class(scheme)
        self._root = str(self._class._strip_protocol(self._url)).rstrip("/")
        self._files: Any = None  # connected

    async def page(self, bucket: str, prefix: str, most: int, after: str) -> tuple[list[Object], str]:
        return await _in_thread(lambda: self._page(prefix, after))

    async def read(self, bucket: str, key: str, version: str, most: int) -> bytes:
        return await _in_thread(lambda: self._read(key, version, most))

    def _page(self, prefix: str, after: str) -> tuple[list[Object], str]:
        """The file of this name, or the files of one folder (a prefix that is empty or ends with a slash)."""
        folders = after.split("\0\0") if after else [prefix]
        folder = folders.pop()
        if folder == _FAILED:
            raise OSError("a folder could not be listed")
        if folder and not folder.endswith("/"):
            info = self._ask("info", folder)
            return ([] if info["type"] != "file" else [self._object(info)]), ""
        found = []
        try:
            for info in self._ask("ls", folder, detail=True):
                if info["type"] == "directory":
                    folders.append(self._key(info) + "/")
                elif self._key(info).startswith(folder) and (file := self._file(info)):
                    found.append(self._object(file))
        except OSError as error:
            if not after and self._ask("info", folder)["type"] == "file":
                return [], ""
            if not after or not isinstance(error, FileNotFoundError | PermissionError):  # or the server is away
                raise
            folders = [_FAILED, *(one for one in folders if one != _FAILED)]
        return found, "\0\0".join(folders)

    def _file(self, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What a name stands for, if it is a file: links to files are followed."""
        if info["type"] == "link":
            with suppress(FileNotFoundError):
                info = {**self._ask("info", self._key(info)), "name": info["name"]}
        return info if info["type"] == "file" else None

    def _read(self, key: str, version: str, most: int) -> bytes:
        data: bytes = self._ask("cat_file", key, start=0, end=most)
        if self._object(self._ask("info", key)).version != version:
            raise changed()
        return data

    def _ask(self, method: str, key: str, **asked: object) -> Any:
        """Call a method of the file system with the path of a key."""
        try:
            if self._files is None:
                self._files = self._connected()
            path = str(self._class._strip_protocol(f"{self._url}/{key}")).rstrip("/") or "/"
            return getattr(self._files, method)(path, **asked)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            self._files = None
            raise

    def _connected(self) -> Any:
        import fsspec

        asked: dict[str, object] = {"use_listings_cache": False}
        if self._scheme in ("sftp", "ssh"):
            asked = {"host_key_policy": _known_hosts(), "timeout": 20.0, "banner_timeout": 20.0}
        return fsspec.core.url_to_fs(self._url, skip_instance_cache=True, **asked)[0]

    def _key(self, info: Mapping[str, Any]) -> str:
        return str(info["name"]).removeprefix(self._root).strip("/")

    def _object(self, info: Mapping[str, Any]) -> Object:
        at = next((when for name in _TIMES if (when := _when(info.get(name)))), None)
        version = next(
            (str(info[name]).strip('"') for name in _VERSIONS if info.get(name)), at.isoformat() if at else ""
        )
        if not version:
            raise Fatal(f"{self._url} tells neither a version nor a time of change of its files; copy them first.")
        return Object(self._key(info), int(info["size"] or 0), at or datetime.fromtimestamp(0, UTC), version)


def _when(value: object) -> datetime | None:
    with suppress(ValueError):
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / (1000 if value > 1e11 else 1), UTC)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    return None


def _known_hosts() -> Any:
    """paramiko itself trusts any host whose key it does not know."""
    import paramiko  # type: ignore[import-untyped]

    class KnownHosts(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
        def missing_host_key(self, client: object, hostname: str, key: Any) -> None:
            known = paramiko.HostKeys()
            for file in (Path("/etc/ssh/ssh_known_hosts"), Path("~/.ssh/known_hosts").expanduser()):
                with suppress(OSError):
                    known.load(str(file))
            if not known.check(hostname, key):
                raise Fatal(
                    f"The SSH key of {hostname} ({key.get_name()}) is not in ~/.ssh/known_hosts: check it, then add it "
                    "with ssh-keyscan."
                )

    return KnownHosts()


async def _in_thread(call: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but a call that hangs does not keep the process from ending."""
    answer = Future[T]()
    answer.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(answer)
