"""The three ways in which things go wrong, told apart once and for all.

* `Rejected`: a bad file. That is data: it becomes a row with a reason code, never a stack trace.
* `Retry`: the world is down for a moment (share gone, disk full, engine trouble). The file keeps its
  place and is tried again.
* `Fatal`: the user has to do something first. One sentence and an exit code.

Anything else is a bug in cxrbatch and is allowed to look like one.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

__all__ = ["PASSING_REASONS", "ExitCode", "Fatal", "ReasonCode", "Rejected", "Retry", "StoreDown"]


class ExitCode(IntEnum):
    """What the shell is told (documented in docs/reference/exit-codes.md)."""

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
    """Why a file has no score. Each is a column value that people filter by: never rename one."""

    # What the folder holds is not a file that can be read.
    NOT_A_REGULAR_FILE = "not_a_regular_file"  # FIFO, socket, device node
    SYMLINK_OUTSIDE_ROOT = "symlink_outside_root"
    SYMLINK_LOOP = "symlink_loop"
    SYMLINK_BROKEN = "symlink_broken"
    PERMISSION_DENIED = "permission_denied"
    FILE_TOO_LARGE = "file_too_large"  # bytes on disk over max_file_mib
    # The world moved under us: tried again by the next scan.
    UNREADABLE = "unreadable"  # EIO, ESTALE, ...
    VANISHED = "vanished"
    CHANGED_WHILE_READ = "changed_while_read"
    # The bytes are not a picture that we know.
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"  # text, HTML, zip, PDF, executables, noise
    UNSUPPORTED_FORMAT = "unsupported_format"  # a picture, but not DICOM, PNG, JPEG or TIFF
    DICOMDIR = "dicomdir"
    NO_PIXEL_DATA = "no_pixel_data"
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    UNSUPPORTED_PIXELS = "unsupported_pixels"  # a photometric interpretation or bit depth nobody defines
    # The bytes claim to be a picture and lie.
    TRUNCATED = "truncated"
    CORRUPT_DICOM = "corrupt_dicom"
    CORRUPT_PIXELS = "corrupt_pixels"
    TOO_MANY_PIXELS = "too_many_pixels"  # over max_pixels_mpx
    INFLATES_TOO_FAR = "inflates_too_far"  # deflated DICOM over max_inflated_mib
    # Decoding took the worker with it.
    DECODER_CRASHED = "decoder_crashed"
    DECODE_TIMEOUT = "decode_timeout"
    DECODER_OUT_OF_MEMORY = "decoder_out_of_memory"
    # A picture, but not one that a model should see.
    CONSTANT_IMAGE = "constant_image"
    TOO_SMALL = "too_small"
    # The model.
    NON_FINITE_OUTPUT = "non_finite_output"
    ENGINE_FAILED = "engine_failed"


#: Reasons that may heal by themselves; every other one is final for these bytes.
PASSING_REASONS = frozenset(
    {
        ReasonCode.UNREADABLE,
        ReasonCode.PERMISSION_DENIED,
        ReasonCode.VANISHED,
        ReasonCode.CHANGED_WHILE_READ,
        ReasonCode.ENGINE_FAILED,
    }
)


class Rejected(Exception):
    """This file cannot be scored, and why: one clear sentence without identifiers in it.

    Pickles across processes (decode workers raise it).
    """

    def __init__(self, reason_code: ReasonCode, reason: str) -> None:
        super().__init__(reason_code, reason)
        self.reason_code = reason_code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason_code}: {self.reason}"


class Retry(Rejected):
    """The file may be fine; the world was not. It is tried again, by the next scan at the latest."""


class Fatal(Exception):
    """The user has to do something first. `str(error)` says what, in one sentence."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FATAL) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoreDown(Exception):
    """The store cannot take this now (down, busy, full, deadlock). Nothing was kept: try the batch again."""
