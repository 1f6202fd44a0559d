"""Write images as DICOM files in several transfer syntaxes; every file says that it is synthetic."""

from __future__ import annotations

import hashlib
from io import BytesIO
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

__all__ = ["as_dicom", "encode_frame", "write_dicom"]

_NATIVE = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)


def write_dicom(dataset: Dataset) -> bytes:
    """The bytes of a DICOM file (PS3.10), with preamble and file meta information."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def as_dicom(
    stored: NDArray[Any], syntax: UID = ExplicitVRLittleEndian, *, bits: int = 8, patient: int = 1, **elements: Any
) -> Dataset:
    """A DX image of stored values (rows, columns), uint8 or uint16, encoded in `syntax`.

    `elements` are further attributes by keyword. UIDs are derived from the content: the same call gives the same file.
    """
    dataset = Dataset()
    digest = hashlib.sha256(stored.tobytes() + repr((syntax, bits, sorted(elements.items()))).encode()).digest()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = _uid(digest)
    dataset.StudyInstanceUID = _uid(b"study %d" % patient)
    dataset.SeriesInstanceUID = _uid(b"series %d" % patient)
    dataset.PatientName = "SYNTHETIC^PHANTOM"
    dataset.PatientID = f"SYNTH-{patient:03d}"
    dataset.PatientBirthDate = ""
    dataset.AccessionNumber = f"SYNTH-A{patient:03d}"
    dataset.StudyDate = "20200101"
    dataset.Modality = "DX"
    dataset.Manufacturer = "cxrbatch samples (synthetic)"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.ImageComments = "Synthetic image made by a program; shows no patient"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = stored.dtype.itemsize * 8
    dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.ImplementationClassUID = _uid(b"cxrbatch")
    if syntax in _NATIVE:
        order: Literal["<", ">"] = ">" if syntax == ExplicitVRBigEndian else "<"
        dataset.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    else:
        dataset.PixelData = encapsulate([encode_frame(stored, syntax)])
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize == 2 or syntax == ImplicitVRLittleEndian else "OB"
    return dataset


def encode_frame(stored: NDArray[Any], syntax: UID) -> bytes:
    """One frame as a codestream of a compressed transfer syntax."""
    if syntax == JPEGBaseline8Bit:
        return bytes(imagecodecs.jpeg8_encode(stored, level=92))
    if syntax == JPEGLosslessSV1:
        return bytes(imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1))
    if syntax == JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(stored))
    if syntax == JPEG2000Lossless:
        return bytes(imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat="j2k"))
    if syntax == JPEG2000:
        return bytes(imagecodecs.jpeg2k_encode(stored, level=45, codecformat="j2k"))
    if syntax == HTJ2KLossless:
        return bytes(imagecodecs.htj2k_encode(stored, reversible=True))
    if syntax == RLELossless:
        return _rle_frame(stored)
    raise ValueError(f"no encoder for {syntax.name}")


def _rle_frame(stored: NDArray[Any]) -> bytes:
    """PS3.5 Annex G: one segment per byte of a sample, most significant first, each row packed separately."""
    octets = stored.astype(stored.dtype.newbyteorder(">")).view(np.uint8).reshape(*stored.shape, -1)
    segments = []
    for number in range(octets.shape[2]):
        packed = b"".join(bytes(imagecodecs.packbits_encode(row.tobytes())) for row in octets[:, :, number])
        segments.append(packed + b"\x00" * (len(packed) % 2))
    offsets = 64 + np.cumsum([0] + [len(segment) for segment in segments[:-1]])
    header = np.zeros(16, "<u4")
    header[0] = len(segments)
    header[1 : len(segments) + 1] = offsets
    return header.tobytes() + b"".join(segments)


def _uid(seed: bytes) -> UID:
    return UID(f"2.25.{int.from_bytes(hashlib.sha256(seed).digest()[:15], 'big')}")
