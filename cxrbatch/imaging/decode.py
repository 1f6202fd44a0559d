"""Decode the bytes of one file to grey model inputs. Runs in killable worker processes. Never imports torch.

`decode_file` reads a path, `decode_bytes` what is in memory, `read_grey` stops before the model inputs.
Whatever the input, they raise only Rejected or its subclass Retry.
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

from cxrbatch import unexpected
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import ReasonCode, Rejected, Retry
from cxrbatch.imaging.formats.raster import read_jpeg, read_png
from cxrbatch.imaging.formats.sniff import sniff
from cxrbatch.imaging.formats.stored import StoredImage
from cxrbatch.imaging.formats.tiff import read_tiff
from cxrbatch.imaging.limits import Limits
from cxrbatch.imaging.normalize import MEAN_ROOM, fit_model_input, render, shrink_factor
from cxrbatch.imaging.open_inside import open_inside
from cxrbatch.imaging.polarity import looks_negative
from cxrbatch.types import DecodedImage, ImageFacts, ModelInputSpec, to_int64

__all__ = ["Identifiers", "Limits", "decode_bytes", "decode_file", "read_for_viewer", "read_grey"]

P = ParamSpec("P")
T = TypeVar("T")


def decode_file(
    path: str,
    size: int,
    mtime_ns: int,
    specs: tuple[ModelInputSpec, ...],
    limits: Limits,
    identifiers: Identifiers,
    exact: bool = False,
    roots: tuple[str, ...] = (),
) -> DecodedImage:
    """Read one file that discovery saw below `roots` with `size` bytes and `mtime_ns`, and decode it.

    Raises Rejected, or Retry if the file vanished, changed or could not be read. No error text contains the path or
    an identifier.
    """
    return decode_bytes(_guarded(_read, path, size, mtime_ns, limits, roots), specs, limits, identifiers, exact)


def decode_bytes(
    data: bytes, specs: tuple[ModelInputSpec, ...], limits: Limits, identifiers: Identifiers, exact: bool = False
) -> DecodedImage:
    """Decode the bytes of one file to its facts and a model input for each spec. Raises Rejected.

    Large images are shrunk while decoding, by the codec where possible, to no less than twice the size of the model
    inputs; `exact` decodes and windows every pixel.
    """
    return _guarded(_decoded, data, specs, limits, identifiers, exact)


def read_grey(data: bytes, limits: Limits = Limits()) -> tuple[NDArray[np.uint8], ImageFacts]:  # noqa: B008
    """The grey image (rows, columns) uint8 in full size, after the pixel policy. Raises Rejected."""
    grey, facts, _ = _guarded(_grey, data, (), limits, Identifiers(mode="drop"))
    return grey, facts


def read_for_viewer(path: str, sha256: str, limits: Limits, specs: tuple[ModelInputSpec, ...]) -> StoredImage:
    """The stored values of a file that the store knows by its sha256, smaller where a codec can and `specs` allow it.

    The file's time may have changed (a copy, a restored backup): its bytes may not. Raises Rejected.
    """

    def read() -> StoredImage:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _os_problem(error) from None
        data = _read(path, status.st_size, status.st_mtime_ns, limits, ())
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Retry(ReasonCode.CHANGED_WHILE_READ, "The file has other bytes than when it was scored.")
        return _stored_image(data, specs, limits, Identifiers(mode="drop"))

    return _guarded(read)


def _decoded(
    data: bytes, specs: tuple[ModelInputSpec, ...], limits: Limits, identifiers: Identifiers, exact: bool
) -> DecodedImage:
    grey, facts, extent = _grey(data, () if exact else specs, limits, identifiers)
    model_inputs = {spec: fit_model_input(grey, spec, extent) for spec in specs}
    return DecodedImage(hashlib.sha256(data).hexdigest(), facts, model_inputs)


def _grey(
    data: bytes, specs: tuple[ModelInputSpec, ...], limits: Limits, identifiers: Identifiers
) -> tuple[NDArray[np.uint8], ImageFacts, tuple[float, float]]:
    """The grey image (shrunk as far as `specs` allow; in full if empty), its facts, its extent for fit_model_input."""
    image = _stored_image(data, specs, limits, identifiers)
    rows, columns = image.size
    left = max(1, shrink_factor(rows, columns, specs, MEAN_ROOM) // image.shrunk)
    rendered = render(image.samples, image.scale, shrink=left, size=image.size)
    flags = dict.fromkeys(image.facts.quality_flags + rendered.quality_flags)
    if "colour" not in flags and looks_negative(rendered.grey):
        flags["polarity_suspect"] = None
    facts = replace(
        image.facts,
        grey_path=rendered.grey_path,
        grey_mean=round(rendered.grey_mean, 2),
        inverted=rendered.inverted,
        quality_flags=tuple(flags),
    )
    shrunk = image.shrunk * left
    return rendered.grey, facts, (rows / shrunk, columns / shrunk)


def _stored_image(
    data: bytes, specs: tuple[ModelInputSpec, ...], limits: Limits, identifiers: Identifiers
) -> StoredImage:
    match sniff(data):
        case "dicom":
            # Imported here because pydicom takes 0.25 CPU seconds to load, which folders without DICOM do not need.
            from cxrbatch.imaging.dicom.image import read_dicom_image

            return read_dicom_image(data, limits, identifiers, specs)
        case "png":
            return read_png(data, limits)
        case "jpeg":
            return read_jpeg(data, limits, specs)
        case "tiff":
            return read_tiff(data, limits)


def _guarded(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a step on untrusted bytes. An error that the readers do not expect rejects the file and is reported.

    It catches BaseException because decoders in Rust panic with one (pyo3's PanicException).
    """
    try:
        return step(*args, **kwargs)
    except Rejected as problem:
        raise problem from None  # its cause may quote the file
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise Rejected(ReasonCode.DECODER_OUT_OF_MEMORY, "Decoding needs more memory than a worker has.") from None
    except RecursionError:
        raise Rejected(ReasonCode.CORRUPT_DICOM, "Sequences are nested too deeply.") from None
    except BaseException as error:
        unexpected.report(error)
        raise Rejected(ReasonCode.CORRUPT_PIXELS, f"Decoding failed ({type(error).__name__}).") from None


def _read(path: str, size: int, mtime_ns: int, limits: Limits, roots: tuple[str, ...]) -> bytes:
    """The file's bytes, if the file did not change while it was read."""
    try:
        descriptor = open_inside(path, roots)
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
    # The values may come from the job queue, which stores no times after 2262.
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
