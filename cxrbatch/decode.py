"""Bytes in, one grey picture out: the stage that runs in killable worker processes. Never imports torch.

`decode_file` reads a path, `decode_bytes` what is in memory, `read_grey` stops before the planes.
Whatever the input, they raise Rejected or its kind Retry, and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxrbatch.dicom.identifiers import Identifiers
from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.formats.limits import Limits
from cxrbatch.formats.raster import read_jpeg, read_png
from cxrbatch.formats.sniff import sniff
from cxrbatch.formats.stored import StoredPicture
from cxrbatch.formats.tiff import read_tiff
from cxrbatch.normalize import MEAN_ROOM, fit_plane, render, shrink_factor
from cxrbatch.nouns import DecodedImage, ImageFacts, PlaneSpec, to_int64
from cxrbatch.polarity import looks_negative

__all__ = ["Identifiers", "Limits", "decode_bytes", "decode_file", "read_grey"]

P = ParamSpec("P")
T = TypeVar("T")


def decode_file(
    path: str,
    size: int,
    mtime_ns: int,
    specs: tuple[PlaneSpec, ...],
    limits: Limits,
    identifiers: Identifiers,
    exact: bool = False,
) -> DecodedImage:
    """Read one file that discovery saw with `size` bytes and `mtime_ns`, and decode it.

    Raises Rejected; Retry when the file vanished, changed or could not be read. No error text holds the
    path or an identifier.
    """
    return decode_bytes(_guarded(_read, path, size, mtime_ns, limits), specs, limits, identifiers, exact)


def decode_bytes(
    data: bytes, specs: tuple[PlaneSpec, ...], limits: Limits, identifiers: Identifiers, exact: bool = False
) -> DecodedImage:
    """Decode the bytes of one file to its facts and a plane for each spec. Raises Rejected.

    Large pictures are shrunk on the way, by the codec where it can, to no less than twice what the planes need;
    `exact` decodes and windows every pixel.
    """
    return _guarded(_decoded, data, specs, limits, identifiers, exact)


def read_grey(data: bytes, limits: Limits = Limits()) -> tuple[NDArray[np.uint8], ImageFacts]:  # noqa: B008
    """The grey picture (rows, columns) uint8 in full size, after the pixel policy. Raises Rejected."""
    grey, facts, _ = _guarded(_grey, data, (), limits, Identifiers(mode="drop"))
    return grey, facts


def _decoded(
    data: bytes, specs: tuple[PlaneSpec, ...], limits: Limits, identifiers: Identifiers, exact: bool
) -> DecodedImage:
    grey, facts, extent = _grey(data, () if exact else specs, limits, identifiers)
    planes = {spec: fit_plane(grey, spec, extent) for spec in specs}
    return DecodedImage(hashlib.sha256(data).hexdigest(), facts, planes)


def _grey(
    data: bytes, specs: tuple[PlaneSpec, ...], limits: Limits, identifiers: Identifiers
) -> tuple[NDArray[np.uint8], ImageFacts, tuple[float, float]]:
    """The grey picture, shrunk as far as `specs` allow (without any: in full), its facts, its extent for fit_plane."""
    picture = _stored_picture(data, specs, limits, identifiers)
    rows, columns = picture.size
    left = max(1, shrink_factor(rows, columns, specs, MEAN_ROOM) // picture.shrunk)
    rendered = render(picture.samples, picture.scale, shrink=left, size=picture.size)
    flags = dict.fromkeys(picture.facts.quality_flags + rendered.quality_flags)
    if "colour" not in flags and looks_negative(rendered.grey):
        flags["polarity_suspect"] = None
    facts = replace(picture.facts, grey_path=rendered.grey_path, inverted=rendered.inverted, quality_flags=tuple(flags))
    shrunk = picture.shrunk * left
    return rendered.grey, facts, (rows / shrunk, columns / shrunk)


def _stored_picture(
    data: bytes, specs: tuple[PlaneSpec, ...], limits: Limits, identifiers: Identifiers
) -> StoredPicture:
    match sniff(data):
        case "dicom":
            # Here, because pydicom takes a quarter of a CPU second to load: folders without DICOM do without.
            from cxrbatch.dicom.picture import read_dicom_picture

            return read_dicom_picture(data, limits, identifiers, specs)
        case "png":
            return read_png(data, limits)
        case "jpeg":
            return read_jpeg(data, limits, specs)
        case "tiff":
            return read_tiff(data, limits)


def _guarded(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a step on hostile bytes: what escapes the readers' own checks is damage, whatever it is called.

    BaseException because decoders in Rust panic with one (pyo3's PanicException).
    """
    try:
        return step(*args, **kwargs)
    except Rejected as problem:
        raise problem from None  # what it was raised from may quote the file
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise Rejected(ReasonCode.DECODER_OUT_OF_MEMORY, "Decoding needs more memory than a worker has.") from None
    except RecursionError:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "Sequences are nested too deeply.") from None
    except BaseException as error:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, f"Decoding failed ({type(error).__name__}).") from None


def _read(path: str, size: int, mtime_ns: int, limits: Limits) -> bytes:
    """The file's bytes, if they held still. O_NONBLOCK keeps a FIFO from hanging the open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise Rejected(ReasonCode.NOT_A_REGULAR_FILE, "The name is not that of a regular file.")
            if before.st_size > limits.max_file_bytes:
                raise Rejected(ReasonCode.FILE_TOO_LARGE, f"The file has more than {limits.max_file_mib} MiB.")
            data = file.read(before.st_size + 1)
            after = os.fstat(descriptor)
    except OSError as error:
        raise _os_problem(error) from None
    except ValueError:
        raise Rejected(ReasonCode.UNREADABLE, "The name cannot be opened.") from None
    seen = ((len(data), before.st_mtime_ns), (after.st_size, after.st_mtime_ns), (size, mtime_ns))
    # What was seen may have been through the ledger, which holds no times after 2262.
    if len({(seen_size, to_int64(seen_mtime_ns)) for seen_size, seen_mtime_ns in seen}) > 1:
        raise Retry(ReasonCode.CHANGED_WHILE_READ, "The file changed while it was read.")
    return data


def _os_problem(error: OSError) -> Rejected:
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return Retry(ReasonCode.VANISHED, "The file is gone.")
        case errno.EACCES | errno.EPERM:
            return Retry(ReasonCode.PERMISSION_DENIED, "The file may not be read by this user.")
        case errno.ELOOP:
            return Rejected(ReasonCode.SYMLINK_LOOP, "The name is a link that leads back to itself.")
        case errno.ENXIO | errno.EISDIR | errno.ENODEV:
            return Rejected(ReasonCode.NOT_A_REGULAR_FILE, "The name is not that of a regular file.")
        case _:
            return Retry(ReasonCode.UNREADABLE, f"The file cannot be read ({name}).")
