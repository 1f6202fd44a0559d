"""The Comprehensive 3D SR (TID 1500, Measurement Report): what programs and viewers read.

One measurement group (TID 1501) a label, one for the readers' final label, one for the decision. UNVERIFIED and
PRELIMINARY: nobody has signed it.
"""

from __future__ import annotations

from collections.abc import Sequence

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxrbatch.dicom_out.codes import CHEST, PRIVATE_SCHEME, finding_of, plain, private
from cxrbatch.dicom_out.source import Source, series_of, set_times
from cxrbatch.own_objects import MANUFACTURER, make_uid
from cxrbatch.store.reported import Reported

__all__ = ["RESEARCH_ONLY", "make_report"]

RESEARCH_ONLY = "For research use; decision support only, not a diagnosis."
_PERCENT = Code("%", "UCUM", "Percent")
_RATIO = Code("1", "UCUM", "no units")
# PS3.16 Annex D; the CAD templates (TID 4104) give it in percent, as the certainty that the device places upon a
# finding. pydicom: codes.DCM.CertaintyOfFinding
_CERTAINTY = codes.DCM.CertaintyOfFinding
_THRESHOLD = private("THRESHOLD", "Threshold for reporting")
_GATE = private("GATE_PROBABILITY", "Probability of being a chest radiograph")
_OOD = private("OOD_SCORE", "Unlikeness to training data")
_DECISION = private("DECISION", "Decision of the cascade")
_CHOICE = private("CHOICE", "Choice of the cascade")
_CHOSEN, _NOT_CHOSEN = private("CHOSEN", "Chosen"), private("NOT_CHOSEN", "Not chosen")
_POSSIBLE = private("POSSIBLE", "Not chosen, not ruled out (label set)")
_ABNORMAL = private("ABNORMAL", "Probability of any abnormality")
_DECISIONS = {
    "reported": private("REPORTED", "Reported"),
    "needs_review": private("NEEDS_REVIEW", "Needs review by a reader"),
    "not_chest": private("NOT_CHEST", "Not a chest radiograph"),
}


def make_report(reported: Reported, source: Source, uid: str, series_uid: str) -> Dataset:
    """The report of one image. Raises what highdicom raises for UIDs that are none."""
    evidence = source.evidence()
    groups = _Groups(reported, source)
    device = DeviceObserverIdentifyingAttributes(
        uid=make_uid("device", reported.manifest_sha256),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=plain(reported.cascade)[:64],
        serial_number=reported.manifest_sha256[:64],
    )
    context = ObservationContext(
        observer_device_context=ObserverContext(codes.DCM.Device, device),
    )
    content = MeasurementReport(
        observation_context=context,
        procedure_reported=codes.SCT.PlainRadiography,  # 168537006
        imaging_measurements=groups.all(),
        title=codes.DCM.ImagingMeasurementReport,  # CID 7021
        referenced_images=None,
    )
    dataset = Comprehensive3DSR(
        evidence=[evidence],
        content=content[0],
        series_instance_uid=series_uid,
        series_number=9902,
        sop_instance_uid=uid,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **series_of(reported, "sr"),
    )
    dataset.CodingSchemeIdentificationSequence = [_private_scheme()]  # PS3.3 C.12.1.1.2
    set_times(dataset, source, reported.content_time)
    return dataset


def _private_scheme() -> Dataset:
    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeName = "Codes of cxrbatch"
    item.CodingSchemeResponsibleOrganization = MANUFACTURER
    return item


class _Groups:
    """The measurement groups of one image."""

    def __init__(self, reported: Reported, source: Source) -> None:
        self._reported = reported
        self._image = SourceImageForMeasurementGroup(source.sop_class_uid, source.sop_instance_uid)
        self._algorithm = AlgorithmIdentification(
            name=plain(reported.cascade),
            version=plain(reported.cascade).rpartition(" ")[2],
            parameters=[f"manifest sha256 {reported.manifest_sha256}"],
            family=codes.DCM.ArtificialIntelligence,  # CID 7162
            manufacturer=MANUFACTURER,
        )

    def all(self) -> list[MeasurementsAndQualitativeEvaluations]:
        said = self._reported
        groups = [self._decision()]
        for label, probability in said.probabilities:
            measurements = [Measurement(_CERTAINTY, round(100 * probability, 2), _PERCENT)]
            if said.threshold is not None and label == said.label:
                measurements.append(Measurement(_THRESHOLD, round(100 * said.threshold, 2), _PERCENT))
            # A reader of the report that looks at findings only must not take an unlikely one for found.
            not_chosen = _POSSIBLE if label in said.label_set else _NOT_CHOSEN
            chosen = QualitativeEvaluation(_CHOICE, _CHOSEN if label == said.label else not_chosen)
            groups.append(self._group(label, finding_of(label), measurements, [chosen]))
        if said.reviewed_at is not None:
            finding = finding_of(said.final_label) if said.final_label else private("NO_FINAL", "No final label")
            source = QualitativeEvaluation(private("SOURCE", "Source"), private("READER", "Readers' final label"))
            groups.append(self._group("reader", finding, evaluations=[source], by_algorithm=False))
        return groups

    def _decision(self) -> MeasurementsAndQualitativeEvaluations:
        said = self._reported
        measurements = []
        if said.gate_probability is not None:
            measurements.append(Measurement(_GATE, round(100 * said.gate_probability, 2), _PERCENT))
        if said.abnormal_probability is not None:
            measurements.append(Measurement(_ABNORMAL, round(100 * said.abnormal_probability, 2), _PERCENT))
        if said.ood_score is not None:
            measurements.append(Measurement(_OOD, round(said.ood_score, 3), _RATIO))
        decision = QualitativeEvaluation(_DECISION, _DECISIONS[said.decision])
        group = self._group("decision", finding_of(said.label), measurements, [decision])
        texts = [RESEARCH_ONLY]
        if said.review_reasons:
            texts.append("Why it needs review: " + ", ".join(said.review_reasons))
        if said.quality_flags:
            texts.append("Image quality: " + ", ".join(said.quality_flags))
        for text in texts:
            # TID 1501 allows text beside codes (row 11); highdicom's arguments know codes only.
            comment = TextContentItem(codes.DCM.Comment, text, RelationshipTypeValues.CONTAINS)
            group[0].ContentSequence.append(comment)
        return group

    def _group(
        self,
        name: str,
        finding: Code,
        measurements: Sequence[Measurement] = (),
        evaluations: Sequence[QualitativeEvaluation] = (),
        *,
        by_algorithm: bool = True,
    ) -> MeasurementsAndQualitativeEvaluations:
        said = self._reported
        return MeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(
                uid=make_uid(said.sha256, said.manifest_sha256, "finding", name), identifier=plain(name)
            ),
            finding_type=CodedConcept.from_code(finding),
            algorithm_id=self._algorithm if by_algorithm else None,
            finding_sites=[FindingSite(anatomic_location=CHEST)],
            measurements=list(measurements) or None,
            qualitative_evaluations=list(evaluations) or None,
            source_images=[self._image],
        )
