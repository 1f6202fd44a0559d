"""Objects in a bucket, or files on a server, instead of files in a folder: `s3://bucket/prefix`, `sftp://host/folder`.

An object comes into being whole, so it never has to stand still first. Its version (ETag, or Google's generation) says
whether it has changed: the time of a change has whole seconds only. What a store or server refuses, fails at or is too
slow for may heal: such an object is tried again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from cxrbatch.errors import ExitCode, Fatal, ReasonCode, Rejected, Retry
from cxrbatch.imaging.limits import Limits
from cxrbatch.intake.file_servers import FileServer
from cxrbatch.intake.object_stores import OBJECT_STORES, Object, Store, changed
from cxrbatch.types import FoundFile

__all__ = ["check_remote", "comes_whole", "is_remote", "list_objects", "look_at_remote", "normal_path", "read_object"]

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_PAGE = 1000  # objects, the most that S3 lists at once
_ANSWER_S = 30.0  # for the first answer of a bucket; the libraries would retry for minutes


def is_remote(path: str) -> bool:
    """Whether a root or a found path is an object's URL; paths of files are absolute."""
    return not path.startswith("/") and _URL.match(path) is not None


def comes_whole(path: str) -> bool:
    """Whether what is at this path is there in whole or not at all: an object of a store, not a file."""
    return is_remote(path) and path.partition("://")[0] in OBJECT_STORES


def normal_path(path: str) -> str:
    """A file, folder or URL of the command line as it stands in the store.

    Raises Fatal (exit 2) for a URL that carries a password. (The command line refuses an empty text.)
    """
    if not is_remote(path):
        absolute = os.path.abspath(path)
        return absolute[1:] if absolute.startswith("//") else absolute  # two slashes may mean something else in POSIX
    scheme, _, rest = path.partition("://")
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        raise Fatal("A URL must not carry a password: give credentials by the environment.", ExitCode.USAGE)
    return f"{scheme}://{rest.strip('/')}"


def check_remote(root: str) -> None:
    """Raises Fatal (one sentence) where nothing can be listed: no such bucket, refused, unreachable, not installed."""
    scheme, bucket, prefix = _parts(root)
    try:  # the prefix: credentials may be for it alone
        _wait(store_of(scheme, bucket), "page", bucket, prefix, 1, "", timeout=_ANSWER_S)
    except Fatal:
        raise
    except Exception as error:  # each library has exceptions of its own
        raise Fatal(_why_not(root, error)) from None


def list_objects(root: str) -> Iterator[FoundFile]:
    """Every object below `root` (a bucket or a prefix up to a slash) or named by it, a page at a time.

    A listing that fails half-way ends with `root` and a slash, and the problem: objects that are listed have none.
    """
    try:
        scheme, bucket, prefix = _parts(root)
        for found in _objects(store_of(scheme, bucket), bucket, prefix):
            path = f"{scheme}://{bucket}/{found.key}"
            yield FoundFile(path, found.size, _changed_ns(found), 0, version=found.version)
    except Fatal:
        raise
    except Exception as error:
        reason = f"The bucket could not be listed ({type(error).__name__}); it is tried again by the next scan."
        yield FoundFile(root + "/", 0, 0, 0, Retry(ReasonCode.UNREADABLE, reason))


def look_at_remote(file: FoundFile) -> FoundFile:
    """The file as its server has it now. Raises OSError where it is gone or cannot be looked at."""
    try:
        scheme, bucket, key = _parts(file.path)
        page, _ = _wait(store_of(scheme, bucket), "page", bucket, key, 1, "", timeout=_ANSWER_S)
    except Exception as error:
        raise OSError(str(error)) from None
    if not page or page[0].key != key:
        raise FileNotFoundError(file.path)
    return replace(file, size=page[0].size, mtime_ns=_changed_ns(page[0]), version=page[0].version)


def read_object(file: FoundFile, limits: Limits) -> bytes:
    """The bytes of an object, if it is still the version that was listed. Raises Rejected or Retry."""
    if file.size > limits.max_file_bytes:
        raise Rejected(ReasonCode.FILE_TOO_LARGE, f"The file has more than {limits.max_file_mib} MiB.")
    if not file.size:
        return b""
    try:
        scheme, bucket, key = _parts(file.path)
        data: bytes = _wait(store_of(scheme, bucket), "read", bucket, key, file.version, file.size + 1)
        if len(data) > file.size:
            raise changed()
        if len(data) < file.size:
            raise OSError("the answer ended early")
    except Exception as error:
        raise _problem(error) from None
    return data


@cache
def store_of(scheme: str, bucket: str) -> Store:
    """The store or server of a URL; nothing is asked of it yet. Raises Fatal."""
    if scheme in ("file", "local"):
        raise Fatal(f"{scheme}:// is not needed: name the folder by its path.", ExitCode.USAGE)
    try:
        return OBJECT_STORES[scheme]() if scheme in OBJECT_STORES else FileServer(scheme, bucket)
    except ValueError:
        known = "s3://, gs://, az://, sftp:// or another scheme of fsspec"
        raise Fatal(f"{scheme}:// cannot be read; use {known}.", ExitCode.USAGE) from None
    except ImportError as error:
        library = _LIBRARIES.get(scheme, str(error))
        raise Fatal(f"Reading {scheme}:// needs a library that is not installed: {library}.") from None


def _wait(store: Store, method: str, *args: object, timeout: float | None = None) -> Any:
    from fsspec.asyn import get_loop, sync

    return sync(get_loop(), getattr(store, method), *args, timeout=timeout)


_LIBRARIES = {
    "s3": "pip install 'cxrbatch[remote]'",
    "gs": "pip install 'cxrbatch[remote]' gcsfs",
    "az": "pip install 'cxrbatch[remote]' adlfs",
    "sftp": "pip install 'cxrbatch[remote]' paramiko",
}
_CREDENTIALS = {
    "s3": "AWS_PROFILE, AWS_ACCESS_KEY_ID",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_KEY",
    "sftp": "an SSH agent, FSSPEC_SFTP_KEY_FILENAME or FSSPEC_SFTP_PASSWORD",
}
_ENDPOINT = {
    "s3": "the endpoint (AWS_ENDPOINT_URL)",
    "gs": "the endpoint (STORAGE_EMULATOR_HOST)",
    "az": "the account (AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT_NAME)",
}


def _objects(store: Store, bucket: str, prefix: str) -> Iterator[Object]:
    for start in [prefix, prefix + "/"] if prefix else [""]:  # an object of this very name, and what lies below it
        most = 1 if start and not start.endswith("/") else _PAGE
        after = ""
        while True:
            page, after = _wait(store, "page", bucket, start, most, after)
            for found in page:
                exact = start.endswith("/") or not start or found.key == start
                if exact and (found.size or not found.key.endswith("/")):  # consoles keep folders as empty objects
                    yield found
            if not after or (page and most == 1):  # a page may be empty, and others follow
                break


def _changed_ns(found: Object) -> int:
    return int(found.changed.timestamp()) * 10**9


def _parts(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key (or prefix)."""
    scheme, _, inner = url.partition("://")
    bucket, _, key = inner.partition("/")
    return scheme, bucket, key


def _problem(error: Exception) -> Rejected:
    if isinstance(error, Rejected):
        return error
    if re.search(r"\(InvalidObjectState\)|ErrorCode:BlobArchived", f"{error.__cause__} {error}"):  # S3's is 403, too
        return Retry(ReasonCode.UNREADABLE, "The object is archived: restore it first, then it is tried again.")
    match _status(error):
        case 404:
            return Retry(ReasonCode.VANISHED, "The object is gone.")
        case 401 | 403:
            return Retry(ReasonCode.PERMISSION_DENIED, "The object may not be read with these credentials.")
        case 412:
            return changed()
    return Retry(ReasonCode.UNREADABLE, f"The object cannot be read ({type(error).__name__}); it is tried again.")


def _why_not(root: str, error: Exception) -> str:
    scheme, bucket, _ = _parts(root)
    url, endpoint = f"{scheme}://{bucket}", _ENDPOINT.get(scheme, "the name of the server")
    variables = _CREDENTIALS.get(scheme, f"FSSPEC_{scheme.upper()}_USERNAME, FSSPEC_{scheme.upper()}_PASSWORD")
    match _status(error):
        case 404 if scheme not in OBJECT_STORES:
            return f"There is no {root}; check the path."
        case 404:
            return f"There is no bucket {url}; check the name and {endpoint}."
        case 401 | 403:
            return f"{url} may not be listed with these credentials; check them ({variables})."
    return f"{url} cannot be listed ({type(error).__name__}); check the network and {endpoint}."


def _status(error: Exception) -> int:
    """The HTTP status behind a library's exception; 0 where none is known."""
    if isinstance(error, FileNotFoundError):
        return 404
    refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # gcsfs's: a plain OSError
    if refused or re.search("Credential|Authentication|Signing", type(error).__name__):  # one is no Base64, say
        return 403
    answer = getattr(error.__cause__ or error, "response", None)
    if isinstance(answer, dict):  # botocore's
        if "Token" in answer.get("Error", {}).get("Code", ""):  # of a session: invalid, to be refreshed; these are 400
            return 403
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = str(getattr(error, "status_code", None) or getattr(error, "code", None))  # Azure's, gcsfs's
    return int(status) if status.isdigit() else 0
