"""From a stored result to DICOM objects of the same study: the source is opened again, and must not have changed."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from cxrbatch import unexpected
from cxrbatch.dicom_out.capture import make_capture
from cxrbatch.dicom_out.report import make_report
from cxrbatch.dicom_out.source import Source, inherit, is_uid
from cxrbatch.errors import Rejected
from cxrbatch.imaging.decode import read_grey
from cxrbatch.imaging.dicom.read import read_dicom
from cxrbatch.imaging.limits import Limits
from cxrbatch.intake.remote import is_remote
from cxrbatch.own_objects import make_uid
from cxrbatch.store.paths import text_to_path
from cxrbatch.store.reported import Reported

__all__ = ["KINDS", "Explain", "Kind", "MadeObject", "NotMade", "make_objects"]

Kind = Literal["sc", "sr"]
KINDS: tuple[Kind, ...] = ("sc", "sr")

#: The file's bytes and what was said of it -> what moved the score (h, w), 0..1, over the whole image; None: unknown.
Explain = Callable[[bytes, Reported], NDArray[np.float32] | None]


#: What pydicom and highdicom raise for values that DICOM does not allow: wrong lengths and UIDs (ValueError), unknown
#: value representations (NotImplementedError), ... Anything else is a bug.
_OF_A_HEADER = (ValueError, LookupError, NotImplementedError)


class NotMade(Exception):
    """No object can be made of this result: a code, a sentence without identifiers, and whether it may pass."""

    def __init__(self, code: str, why: str, *, may_pass: bool = False) -> None:
        super().__init__(f"{code}: {why}")
        self.code, self.why, self.may_pass = code, why, may_pass


@dataclass(frozen=True, slots=True)
class MadeObject:
    """One object, ready to be written or sent."""

    kind: Kind
    sop_instance_uid: str
    dataset: Dataset  # with file meta information

    @property
    def encoded(self) -> bytes:
        """The DICOM file (PS3.10)."""
        buffer = BytesIO()
        self.dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def make_objects(
    reported: Reported, kinds: Sequence[Kind], limits: Limits, explain: Explain = lambda data, reported: None
) -> list[MadeObject]:
    """The objects of these kinds. Raises NotMade.

    The same source, bundle, readers' answer and kind give the same UID; with and without a map of what moved the
    score, captures are different objects.
    """
    data = _read_source(reported, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote values
            return _make(reported, kinds, limits, explain, data)
    except (NotMade, MemoryError):
        raise
    except Rejected as rejected:
        raise NotMade(str(rejected.reason_code), rejected.reason) from None
    except _OF_A_HEADER as error:  # its text may quote the header
        raise NotMade(
            "header_unusable",
            f"The source's header has a value that DICOM does not allow ({type(error).__name__}): dciodvfy names it.",
        ) from None
    except Exception as error:
        raise _our_bug(error) from None


def _make(reported: Reported, kinds: Sequence[Kind], limits: Limits, explain: Explain, data: bytes) -> list[MadeObject]:
    header, *_ = read_dicom(data, limits)
    source = Source.of(header)
    if not source.study_instance_uid or not source.sop_instance_uid:
        raise NotMade("no_study", "The source names no study or no instance: its results cannot be filed.")
    for uid in (source.study_instance_uid, source.sop_instance_uid, source.sop_class_uid):
        if not is_uid(uid):
            raise NotMade(
                "header_unusable",
                "The UID of the source's study, instance or SOP class is none (digits and dots, 64 at most): "
                "a PACS may refuse results that name it.",
            )
    made = []
    for kind in kinds:
        heat = _explained(explain, data, reported) if kind == "sc" else None
        identity = (reported.sha256, reported.manifest_sha256, kind)
        uid = make_uid(*identity, reported.revision, "map" if heat is not None else "")
        series_uid = make_uid(*identity, "series")
        if kind == "sc":
            dataset = make_capture(reported, source, read_grey(data, limits)[0], heat, uid, series_uid)
        else:
            try:
                dataset = make_report(reported, source, uid, series_uid)
            except KeyError:  # highdicom looks up what images of the class consist of
                raise NotMade(
                    "header_unusable", "The source is of a private or retired SOP class: no report can be made of it."
                ) from None
        inherit(dataset, header)
        made.append(MadeObject(kind, uid, dataset))
    return made


def _explained(explain: Explain, data: bytes, reported: Reported) -> NDArray[np.float32] | None:
    """The map. Whatever fails here is not the header's fault: its ValueError must not look like one."""
    try:
        return explain(data, reported)
    except (Rejected, MemoryError):
        raise
    except Exception as error:
        raise _our_bug(error) from None


def _our_bug(error: Exception) -> NotMade:
    """Logged and counted, and not final: a later version, or a device that works again, may make the object."""
    unexpected.report(error)
    return NotMade("unexpected_error", f"The object could not be made ({type(error).__name__}).", may_pass=True)


def _read_source(reported: Reported, limits: Limits) -> bytes:
    """The bytes that were scored, from whichever path still has them."""
    changed = False
    for text in reported.paths:
        try:
            # A FIFO that has taken its place is not waited for.
            with open(os.open(text_to_path(text), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > limits.max_file_bytes:
                    changed = True
                    continue
                data = file.read(limits.max_file_bytes)
        except (OSError, ValueError):
            continue
        if hashlib.sha256(data).hexdigest() == reported.sha256:
            return data
        changed = True
    if all(is_remote(text) for text in reported.paths):
        raise NotMade(
            "source_in_bucket", "The source lies in a bucket: results of files on this machine are sent alone."
        )
    if changed:
        raise NotMade("source_changed", "The source has changed since it was scored: scan it again.")
    raise NotMade("source_missing", "The source is gone, or cannot be read.", may_pass=True)
