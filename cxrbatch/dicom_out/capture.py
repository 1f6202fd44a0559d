"""The Secondary Capture: the image and what was said of it, for people, in any viewer."""

from __future__ import annotations

import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from cxrbatch.dicom_out.drawing import draw_capture
from cxrbatch.dicom_out.source import Source, series_of, set_times
from cxrbatch.store.reported import Reported

__all__ = ["make_capture"]


def make_capture(
    reported: Reported,
    source: Source,
    grey: NDArray[np.uint8],
    heat: NDArray[np.float32] | None,
    uid: str,
    series_uid: str,
) -> Dataset:
    """`grey` (rows, columns) is the image under the pixel policy; `heat` (h, w), 0..1, lies over all of it."""
    pixels = draw_capture(reported, grey, heat)
    dataset = SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # replaced below: highdicom wants one
        study_instance_uid=source.study_instance_uid,
        series_instance_uid=series_uid,
        series_number=9901,
        sop_instance_uid=uid,
        **series_of(reported, "sc"),
    )
    # Two images and text share the frame: there is no one direction.
    dataset.PatientOrientation = []
    dataset.Modality = "OT"
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.BodyPartExamined = "CHEST"
    # The chest is not a paired part (PS3.3 C.7.6.1.1.1); a source that names a side keeps it.
    dataset.ImageLaterality = source.image_laterality if source.image_laterality in ("R", "L", "U", "B") else "U"
    # Nothing that we write identifies a patient; what the source had burned in is still there.
    dataset.BurnedInAnnotation = "NO" if source.burned_in_annotation == "NO" else "YES"
    dataset.LossyImageCompression = "00"
    dataset.DerivationDescription = "Scaled copy with the output of a classifier; research use, not for diagnosis"
    dataset.SourceImageSequence = [_reference(source)]
    set_times(dataset, source, reported.content_time)
    dataset.DateOfSecondaryCapture, dataset.TimeOfSecondaryCapture = dataset.ContentDate, dataset.ContentTime
    return dataset


def _reference(source: Source) -> Dataset:
    item, purpose = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, source.sop_instance_uid
    # PS3.16 CID 7202 "Source Image Purposes of Reference"
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item
