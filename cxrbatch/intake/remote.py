"""Objects in a bucket instead of files in a folder: `s3://bucket/prefix`, and whatever else fsspec knows.

An object comes into being whole, so it never has to stand still first. Its version (ETag) says whether it has changed:
the time of a change has whole seconds only. What an object store refuses, fails at or is too slow for may heal: such an
object is tried again. Credentials and endpoints are those of fsspec's libraries (AWS_PROFILE, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from typing import Any

from cxrbatch.errors import ExitCode, Fatal, ReasonCode, Rejected, Retry
from cxrbatch.imaging.limits import Limits
from cxrbatch.types import FoundFile

__all__ = ["check_remote", "is_remote", "list_objects", "normal_url", "read_object"]

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_PAGE = 1000  # objects, the most that S3 lists at once


def is_remote(path: str) -> bool:
    """Whether a root or a found path is an object's URL; paths of files are absolute."""
    return not path.startswith("/") and _URL.match(path) is not None


def normal_url(url: str) -> str:
    """The URL of a bucket or prefix as it stands in the store. Raises Fatal for one that carries a password."""
    scheme, _, rest = url.partition("://")
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        raise Fatal("A URL must not carry a password: give credentials by the environment.", ExitCode.USAGE)
    return f"{scheme}://{rest.strip('/')}"


def check_remote(root: str) -> None:
    """Raises Fatal (one sentence) where nothing can be listed: no such bucket, refused, unreachable, not installed."""
    try:
        file_system = _file_system(root.partition("://")[0])
        bucket = _inner(root).partition("/")[0]
        if _is_s3(file_system):
            file_system.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        else:
            file_system.ls(bucket)
    except Fatal:
        raise
    except Exception as error:  # each library has exceptions of its own
        raise Fatal(_why_not(root, error)) from None


def list_objects(root: str) -> Iterator[FoundFile]:
    """Every object below `root` (a bucket or a prefix up to a slash) or named by it, a page at a time.

    A listing that fails half-way ends with `root` and a slash, which no object is called, and the problem.
    """
    try:
        scheme = root.partition("://")[0]
        file_system = _file_system(scheme)
        pages = _s3_pages if _is_s3(file_system) else _pages
        for info in pages(file_system, _inner(root)):
            yield FoundFile(
                f"{scheme}://{info['name']}", int(info["size"] or 0), _changed_ns(info), 0, version=_version(info)
            )
    except GeneratorExit:
        raise
    except Fatal:
        raise
    except Exception as error:
        reason = f"The bucket could not be listed ({type(error).__name__}); it is tried again by the next scan."
        yield FoundFile(root + "/", 0, 0, 0, Retry(ReasonCode.UNREADABLE, reason))


def read_object(file: FoundFile, limits: Limits) -> bytes:
    """The bytes of an object, if it is still the version that was listed. Raises Rejected or Retry."""
    if file.size > limits.max_file_bytes:
        raise Rejected(ReasonCode.FILE_TOO_LARGE, f"The file has more than {limits.max_file_mib} MiB.")
    if not file.size:
        return b""
    try:
        file_system = _file_system(file.path.partition("://")[0])
        if _is_s3(file_system):
            return _s3_read(file_system, file)
        data: bytes = file_system.cat_file(_inner(file.path), start=0, end=file.size + 1)
        changed = len(data) != file.size or _version(file_system.info(_inner(file.path))) != file.version
    except Exception as error:
        raise _problem(error) from None
    if changed:
        raise _changed()
    return data


def _s3_read(file_system: Any, file: FoundFile) -> bytes:
    """One GET that S3 refuses where the object is another one by now; no more than one byte too many is taken."""
    bucket, _, key = _inner(file.path).partition("/")
    condition = {"IfMatch": f'"{file.version}"'} if file.version else {}
    with _Body(file_system, file_system.call_s3("get_object", Bucket=bucket, Key=key, **condition)) as body:
        data = body.read(file.size + 1)
    if len(data) > file.size:
        raise _changed()
    if len(data) < file.size:
        raise OSError("the answer ended early")
    return data


class _Body:
    """The stream of a GET, read in blocks from the thread that asks."""

    def __init__(self, file_system: Any, answer: Any) -> None:
        self._loop, self._stream = file_system.loop, answer["Body"]

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, most: int) -> bytes:
        from fsspec.asyn import sync

        data = bytearray()
        while len(data) < most and (block := sync(self._loop, self._stream.read, min(2**20, most - len(data)))):
            data += block
        return bytes(data)


def _s3_pages(file_system: Any, inner: str) -> Iterator[dict[str, Any]]:
    bucket, _, prefix = inner.partition("/")
    for start in [prefix, prefix + "/"] if prefix else [""]:  # an object of this very name, and what lies below it
        more: dict[str, Any] = {}
        while True:
            most = 1 if start and not start.endswith("/") else _PAGE
            page = file_system.call_s3("list_objects_v2", Bucket=bucket, Prefix=start, MaxKeys=most, **more)
            for entry in page.get("Contents", ()):
                exact = start.endswith("/") or not start or entry["Key"] == start
                if exact and not entry["Key"].endswith("/"):  # S3's consoles keep folders as empty objects
                    yield {"name": f"{bucket}/{entry['Key']}", "size": entry["Size"], **entry}
            if not page.get("IsTruncated") or most == 1:
                break
            more = {"ContinuationToken": page["NextContinuationToken"]}


def _pages(file_system: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A folder at a time, for object stores that fsspec has no pages of."""
    if file_system.isfile(inner):
        yield file_system.info(inner)
        return
    for _, _, found in file_system.walk(inner, detail=True, on_error="raise"):
        yield from (info for info in found.values() if info["type"] == "file")


@cache
def _file_system(scheme: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise Fatal(
            f"Reading {scheme}:// needs a library that is not installed: pip install 'cxrbatch[remote]' "
            "(and gcsfs for gs://, adlfs for az://)."
        ) from None
    except ValueError:
        raise Fatal(f"{scheme}:// is nothing that fsspec knows; use s3://, gs:// or az://.", ExitCode.USAGE) from None


def _is_s3(file_system: Any) -> bool:
    return hasattr(file_system, "call_s3")


def _inner(url: str) -> str:
    return url.partition("://")[2]


def _version(info: dict[str, Any]) -> str:
    found = next((info[name] for name in ("ETag", "etag", "generation", "md5Hash", "created") if info.get(name)), "")
    return str(found).strip('"')


def _changed_ns(info: dict[str, Any]) -> int:
    found = next((info[name] for name in ("LastModified", "last_modified", "mtime", "created") if info.get(name)), None)
    return int(found.timestamp()) * 10**9 if isinstance(found, datetime) else 0


def _changed() -> Retry:
    return Retry(ReasonCode.CHANGED_WHILE_READ, "The object changed while it was read.")


def _problem(error: Exception) -> Rejected:
    if isinstance(error, Rejected):
        return error
    if isinstance(error, FileNotFoundError):
        return Retry(ReasonCode.VANISHED, "The object is gone.")
    if isinstance(error, PermissionError):
        return Retry(ReasonCode.PERMISSION_DENIED, "The object may not be read with these credentials.")
    answer = getattr(error.__cause__ or error, "response", None)
    if isinstance(answer, dict) and answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
        return _changed()
    return Retry(ReasonCode.UNREADABLE, f"The object cannot be read ({type(error).__name__}); it is tried again.")


def _why_not(root: str, error: Exception) -> str:
    scheme, _, inner = root.partition("://")
    bucket = f"{scheme}://{inner.partition('/')[0]}"
    if isinstance(error, FileNotFoundError):
        return f"There is no bucket {bucket}; check the name and the endpoint (AWS_ENDPOINT_URL)."
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"{bucket} may not be listed with these credentials; check them (AWS_PROFILE, AWS_ACCESS_KEY_ID)."
    return f"{bucket} cannot be listed ({type(error).__name__}); check the network and the endpoint (AWS_ENDPOINT_URL)."
