"""The three kinds of expected errors.

* `Rejected`: a bad file. This is data: it becomes a row with a reason code, never a stack trace.
* `Retry`: a transient problem (share gone, disk full, engine failure). The file is tried again.
* `Fatal`: the user has to do something first. It has one sentence and an exit code.

Anything else is a bug in cxrbatch and is allowed to look like one.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

__all__ = ["TRANSIENT_REASONS", "ExitCode", "Fatal", "ReasonCode", "Rejected", "Retry", "StoreDown"]


class ExitCode(IntEnum):
    """The exit codes of the commands; docs/reference/exit-codes.md explains each."""

    OK = 0
    FATAL = 1
    USAGE = 2
    SOME_REJECTED = 3
    NOTHING_MATCHED = 4
    STORE_NOT_AT_HEAD = 10
    STORE_IN_USE = 11
    BUNDLE_UNUSABLE = 12
    DEVICE_MISSING = 13
    INTERRUPTED = 130


class ReasonCode(StrEnum):
    """Why a file has no score. Users filter by these column values: never rename one."""

    # The name is not that of a readable file.
    NOT_A_REGULAR_FILE = "not_a_regular_file"  # FIFO, socket, device node
    SYMLINK_OUTSIDE_ROOT = "symlink_outside_root"
    SYMLINK_LOOP = "symlink_loop"
    SYMLINK_BROKEN = "symlink_broken"
    PERMISSION_DENIED = "permission_denied"
    FILE_TOO_LARGE = "file_too_large"  # bytes on disk over max_file_mib
    # The file system changed or failed: tried again by the next scan.
    UNREADABLE = "unreadable"  # EIO, ESTALE, ...
    VANISHED = "vanished"
    CHANGED_WHILE_READ = "changed_while_read"
    # The bytes are not an image in a supported format.
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"  # text, HTML, zip, PDF, executables, noise
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image, but not DICOM, PNG, JPEG or TIFF
    DICOMDIR = "dicomdir"
    NO_PIXEL_DATA = "no_pixel_data"
    STRUCTURED_REPORT = "structured_report"  # DICOM SR: words about images
    OWN_OUTPUT = "own_output"  # a capture or report that cxrbatch wrote: it would be scored for ever
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    UNSUPPORTED_PIXELS = "unsupported_pixels"  # a photometric interpretation or bit depth nobody defines
    # The bytes claim to be an image, but are damaged or hostile.
    TRUNCATED = "truncated"
    CORRUPT_DICOM = "corrupt_dicom"
    CORRUPT_PIXELS = "corrupt_pixels"
    TOO_MANY_PIXELS = "too_many_pixels"  # over max_pixels_mpx
    INFLATES_TOO_FAR = "inflates_too_far"  # deflated DICOM over max_inflated_mib
    # The decode worker failed.
    DECODER_CRASHED = "decoder_crashed"
    DECODE_TIMEOUT = "decode_timeout"
    DECODER_OUT_OF_MEMORY = "decoder_out_of_memory"
    DECODE_INTERRUPTED = "decode_interrupted"  # the worker was killed or stopped from outside
    # A valid image that a model must not score.
    CONSTANT_IMAGE = "constant_image"
    TOO_SMALL = "too_small"
    # The model.
    NON_FINITE_OUTPUT = "non_finite_output"
    ENGINE_FAILED = "engine_failed"


#: Reasons that may pass by themselves; every other one is final for these bytes.
TRANSIENT_REASONS = frozenset(
    {
        ReasonCode.UNREADABLE,
        ReasonCode.PERMISSION_DENIED,
        ReasonCode.VANISHED,
        ReasonCode.CHANGED_WHILE_READ,
        ReasonCode.DECODE_INTERRUPTED,
        ReasonCode.ENGINE_FAILED,
    }
)


class Rejected(Exception):
    """This file cannot be scored: a reason code and one sentence without identifiers.

    It can be pickled, because decode workers raise it.
    """

    def __init__(self, reason_code: ReasonCode, reason: str) -> None:
        super().__init__(reason_code, reason)
        self.reason_code = reason_code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason_code}: {self.reason}"


class Retry(Rejected):
    """A transient problem, not of the file itself. It is tried again, by the next scan at the latest."""


class Fatal(Exception):
    """The user has to do something first. `str(error)` says what, in one sentence."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FATAL) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoreDown(Exception):
    """The store cannot accept this now (down, busy, full, deadlock). Nothing was committed: retry the batch."""
