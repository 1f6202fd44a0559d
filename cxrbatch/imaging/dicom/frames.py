"""Decode the first frame of a dataset's pixel data with pydicom's decoder framework and our codecs as plug-ins."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from threading import local
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrbatch import unexpected
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.imaging.dicom.identity import text
from cxrbatch.imaging.dicom.pixel_data import ITEM, begins_again, has_excess, mend_pixel_data
from cxrbatch.imaging.dicom.stored_bits import StoredBits
from cxrbatch.imaging.formats.codecs import CodecOutput, decode_j2k, decode_jpeg, decode_rle
from cxrbatch.imaging.formats.codestream import j2k_codestream, j2k_header, jpeg_header

__all__ = ["FirstFrame", "decode_first_frame", "decode_frame", "decoder_table", "is_available"]

_PLUGIN = "cxrbatch"
_JPEG = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)
_J2K = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
# StoredBits corrects unused bits and signs, in the same way for all codecs; pydicom's own corrections are off.
_AS_DECODED: Any = {
    "view_only": True,
    "correct_unused_bits": False,
    "apply_jls_sign_correction": False,
    "apply_j2k_sign_correction": False,
}
_COLOURS = "The colour space of the pixels is not read."
DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = dict.fromkeys(
    (*_JPEG, *_J2K, RLELossless), ("imagecodecs", "simplejpeg")
)


@dataclass(frozen=True, slots=True, eq=False)
class FirstFrame:
    """Stored values (rows, columns) or (rows, columns, samples), YBR turned to RGB."""

    samples: NDArray[Any]
    decoder: str
    suspect: bool
    shrunk: int = 1  # frame pixels per sample along each side
    above_bits_stored: bool = False  # some values exceed BitsStored: see StoredBits.fit


class _Trace(local):
    """Input and output of the plug-in beyond the bytes that pydicom passes through."""

    most: int = 1
    bits: StoredBits | None = None
    above_bits_stored: bool = False
    output: CodecOutput | None = None
    problem: Rejected | None = None


_trace = _Trace()


class _Smaller(Exception):
    """Raised to leave pydicom, which handles only full-size frames; the smaller frame is in `_trace`."""


def is_available(uid: str) -> bool:
    """pydicom's plug-in protocol: the codecs are dependencies of cxrbatch, so they always are."""
    return uid in DECODER_DEPENDENCIES


def decoder_table() -> list[tuple[str, str | None]]:
    """The keyword of each compressed transfer syntax and its decoder; None if the decoder is missing."""
    codecs = {**dict.fromkeys(_JPEG[:4], "JPEG8"), **dict.fromkeys(_JPEG[4:], "JPEGLS")}
    codecs |= {**dict.fromkeys(_J2K, "JPEG2K"), RLELossless: "PACKBITS"}
    version = f"imagecodecs {imagecodecs.__version__}"
    return [
        (uid.keyword, f"{version} {codec.lower()}" if getattr(imagecodecs, codec).available else None)
        for uid, codec in codecs.items()
    ]


def decode_first_frame(dataset: Dataset, syntax: UID, most: int = 1) -> FirstFrame:
    """Decode frame 0. The caller has checked the dataset's rows x columns against the limits.

    If the codec can shrink, the image is smaller by a factor of at most `most`.

    Raises Rejected: UNSUPPORTED_TRANSFER_SYNTAX, UNSUPPORTED_PIXELS, TRUNCATED, CORRUPT_PIXELS.
    """
    mend_pixel_data(dataset, syntax)
    syntax = _true_syntax(dataset, syntax)
    if _is_native(syntax) and text(dataset, "PhotometricInterpretation").startswith("YBR_PARTIAL"):
        raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, _COLOURS)  # pydicom would miss bytes of the thinned chroma
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    _trace.most, _trace.output, _trace.problem = most, None, None
    _trace.bits, _trace.above_bits_stored = StoredBits.of(dataset), False
    plugin = _PLUGIN if syntax in DECODER_DEPENDENCIES else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            samples, seen = get_decoder(syntax).as_array(dataset, index=0, decoding_plugin=plugin, **_AS_DECODED)
        except (MemoryError, Rejected):
            raise
        except Exception as error:
            smaller = _trace.output
            if smaller is not None and smaller.shrunk > 1:
                suspect = smaller.suspect or begins_again(dataset)
                return FirstFrame(smaller.samples, smaller.decoder, suspect, smaller.shrunk)
            raise (_trace.problem or _explain(error)) from error
        # Gateways that decompress JPEG 2000 leave its two names on what is RGB by then.
        if samples.ndim == 3 and seen["photometric_interpretation"] not in ("RGB", "YBR_RCT", "YBR_ICT"):
            raise Rejected(ReasonCode.UNSUPPORTED_PIXELS, _COLOURS)
        if not plugin and dataset.BitsAllocated != 1:
            samples = _fitted(samples, samples.dtype.itemsize * 8)
    if _trace.output is None:
        excess, above = has_excess(dataset, samples.nbytes), _trace.above_bits_stored
        return FirstFrame(samples, f"pydicom {pydicom.__version__}", excess, above_bits_stored=above)
    output = _trace.output
    suspect = output.suspect or begins_again(dataset)
    return FirstFrame(samples, output.decoder, suspect, above_bits_stored=_trace.above_bits_stored)


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """pydicom's plug-in protocol: decode one frame to the bytes of its samples, planar configuration 0.

    The codec is chosen by the frame's own bytes, because some writers declare a wrong transfer syntax.
    """
    try:
        return _decode_frame(src, runner)
    except Rejected as problem:
        _trace.problem = problem
        raise
    except (_Smaller, MemoryError):
        raise
    except Exception as error:  # damage raises Rejected alone; pydicom would keep only the text of this
        unexpected.report(error)
        raise


def _decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    most = _trace.most if runner.photometric_interpretation in ("MONOCHROME1", "MONOCHROME2") else 1
    if src.startswith(b"\xff\xd8"):
        header = jpeg_header(src)
        _require_size(runner, header.rows, header.columns, header.components)
        output = decode_jpeg(src, header, most)
        if not _can_leave(output):
            output = decode_jpeg(src, header)
        if header.colours:
            runner.set_option("photometric_interpretation", header.colours)
    elif src.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP")):
        size = j2k_header(j2k_codestream(src))
        _require_size(runner, size.rows, size.columns, size.components)
        output = decode_j2k(src, most)
        if not _can_leave(output):
            output = decode_j2k(src)
        if size.is_rgb or runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
            runner.set_option("photometric_interpretation", "RGB")
    elif runner.transfer_syntax == RLELossless:
        pixels, width = runner.rows * runner.columns, max(1, runner.bits_allocated // 8)
        planar, excess = decode_rle(src, pixels, runner.samples_per_pixel, width)
        runner.set_option("planar_configuration", 1)
        kind = "i" if runner.pixel_representation else "u"
        words = np.frombuffer(planar, f"<{kind}{width}")
        _trace.output = CodecOutput(
            np.empty(0), f"imagecodecs {imagecodecs.__version__} packbits", 8 * width, suspect=excess
        )
        fitted = _fitted(words, 8 * width)
        return planar if fitted is words else fitted.tobytes()
    else:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The pixel data are not in a compressed format that is known.")
    if output.lossy and _trace.bits is not None and output.precision < _trace.bits.stored:
        output = replace(output, suspect=True)  # scaled to fewer bits, unlike the header's window
    _trace.output = output
    if output.shrunk > 1:
        raise _Smaller
    samples = output.samples
    wanted = (runner.rows, runner.columns, runner.samples_per_pixel)
    if samples.shape != wanted and (*samples.shape, 1) != wanted:
        raise Rejected(ReasonCode.CORRUPT_PIXELS, "The decoded image has another size than the header says.")
    lossy = output.lossy or runner.transfer_syntax in (JPEG2000, HTJ2K)
    samples = _fitted(samples, output.precision, lossy, own_sign=samples.dtype.kind == "i")
    runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", samples.dtype.itemsize * 8)
    return samples.tobytes()


def _can_leave(output: CodecOutput) -> bool:
    """Whether the shrunk image may be used: values that do not fit must be detected before averaging."""
    return output.shrunk == 1 or (_trace.bits is not None and _trace.bits.fits(output.samples, output.precision))


def _require_size(runner: DecodeRunner, rows: int, columns: int, components: int) -> None:
    """Raise Rejected unless the codestream has the size that was checked: its own size decides what is allocated."""
    if (rows, columns, components) != (runner.rows, runner.columns, runner.samples_per_pixel):
        raise Rejected(
            ReasonCode.CORRUPT_PIXELS,
            f"The header says {runner.columns} x {runner.rows} x {runner.samples_per_pixel}, "
            f"the compressed image {columns} x {rows} x {components}.",
        )


def _true_syntax(dataset: Dataset, declared: UID) -> UID:
    """The declared transfer syntax, or the one that the frame's first bytes show."""
    value = dataset.get("PixelData")
    encapsulated = isinstance(value, bytes) and value.startswith(ITEM)
    if declared in DECODER_DEPENDENCIES or (_is_native(declared) and not encapsulated):
        return declared
    if encapsulated:
        try:
            frame = get_frame(value, 0, number_of_frames=1)
        except Exception as error:
            raise Rejected(ReasonCode.CORRUPT_PIXELS, "The fragments of the pixel data do not parse.") from error
        if frame.startswith(b"\xff\xd8"):
            kinds = {"baseline": JPEGBaseline8Bit, "lossless": JPEGLossless, "ls": JPEGLSNearLossless}
            return kinds.get(jpeg_header(frame).kind, JPEGExtended12Bit)
        if frame.startswith(b"\xff\x4f"):
            return JPEG2000
    raise Rejected(ReasonCode.UNSUPPORTED_TRANSFER_SYNTAX, f"Transfer syntax {str(declared)[:64]} is not read.")


def _fitted(samples: NDArray[Any], precision: int, lossy: bool = False, own_sign: bool = False) -> NDArray[Any]:
    """Samples fitted to the header's BitsStored; whether some exceeded it goes to `_trace`. Raises Rejected."""
    if _trace.bits is None or samples.dtype.kind not in "iu":
        return samples
    samples, _trace.above_bits_stored = _trace.bits.fit(samples, precision=precision, lossy=lossy, own_sign=own_sign)
    return samples


def _is_native(syntax: UID) -> bool:
    try:
        return bool(get_decoder(syntax).is_native)
    except NotImplementedError:
        return False


def _explain(error: Exception) -> Rejected:
    """Map pydicom's errors to reason codes."""
    text = str(error).lower()
    if "less than expected" in text or "insufficient pixel data" in text or "end of input" in text:
        return Rejected(ReasonCode.TRUNCATED, "The pixel data are shorter than the header says.")
    if "third larger" in text or isinstance(error, IndexError):
        return Rejected(ReasonCode.CORRUPT_PIXELS, "The length of the pixel data fits no image of that header.")
    if isinstance(error, AttributeError):
        return Rejected(ReasonCode.CORRUPT_DICOM, "The header lacks an attribute that describes the pixels.")
    if isinstance(error, NotImplementedError) or any(word in text for word in ("photometric", "bits ", "color space")):
        return Rejected(ReasonCode.UNSUPPORTED_PIXELS, "The pixel data have a layout that nobody defines.")
    return Rejected(ReasonCode.CORRUPT_PIXELS, f"The pixel data cannot be read ({type(error).__name__}).")


for _uid in DECODER_DEPENDENCIES:
    get_decoder(_uid).add_plugin(_PLUGIN, (__name__, "decode_frame"))
