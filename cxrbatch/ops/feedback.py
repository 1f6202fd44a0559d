"""What readers said, back out of the store: a dataset, the audit trail, a bundle calibrated on a site's own reads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.ops.terminal import tell
from cxrbatch.output_file import new_file, starts_with
from cxrbatch.settings import Settings
from cxrbatch.store import Store, text_to_path
from cxrbatch.store.connection import connect
from cxrbatch.store.export import CsvLines, defused
from cxrbatch.store.report_data import blinded_labels
from cxrbatch.store.review_images import write_audit
from cxrbatch.store.review_schema import review_status
from cxrbatch.store.schema import FileState, audit, files, images, models, predictions, scores
from cxrbatch.store.sql import utc_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["calibrate_from_reviews", "export_audit", "export_dataset"]

_LEAST_READS = 50  # fewer images say too little about a temperature
_LEAST_OF_CLASS = 5
_LEFT_OUT = "UNREADABLE"
_MANIFEST = ("path", "label", "source", "group", "sha256", "status", "decided_by", "decided_at", "view_position")
_AUDIT = ("id", "at", "actor", "event", "path", "run_id", "old", "new", "detail")
_EARLIER_AUDIT = starts_with(",".join(_AUDIT).encode() + b"\n", b'{"id": ')


def export_dataset(settings: Settings, directory: Path, actor: str) -> None:
    """Copy every image with a final label to DIR/<label>/ and write DIR/manifest.csv, all or nothing.

    `train`, `evaluate` and `calibrate` take such a folder. Copies are whole files with what their headers hold.
    """
    if directory.exists():
        raise Fatal(f"{directory} is there already: name a folder that is not.", ExitCode.USAGE)
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with Store.open(settings.db, may_create=False) as store:
            counts, problems = _write_dataset(store, part)
            if not counts:
                raise Fatal("No image has a final label whose file is still there: nothing was written.")
            os.replace(part, directory)
            write_audit(store, actor, "exported", detail=f"dataset of {counts.total()} image(s) to {directory}")
    finally:
        shutil.rmtree(part, ignore_errors=True)  # of a full disk, or Ctrl-C: copies of images in a hidden folder
    labels = ", ".join(f"{number:,} {label}" for label, number in sorted(counts.items()))
    tell(f"{counts.total():,} image(s) in {directory}: {labels}")
    if problems:
        tell(f"{problems:,} image(s) were left out: their files are gone, have changed or lie in a bucket.", "yellow")


def _write_dataset(store: Store, part: Path) -> tuple[Counter[str], int]:
    """Copies and manifest; returns how many images of each label there are, and how many were left out."""
    counts: Counter[str] = Counter()
    problems = 0
    part.mkdir(parents=True)
    with (part / "manifest.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_MANIFEST)
        for _, rows in groupby(_final_labels(store), key=attrgetter("image_id")):
            found = next(((row, copied) for row in rows if (copied := _copy(row, part))), None)
            problems += found is None
            if found is None:
                continue
            row, copied = found
            group = row.patient_id_hash or row.study_instance_uid or row.sha256
            said = (defused(group), row.sha256, row.status, defused(row.decided_by), utc_text(row.decided_at))
            writer.writerow((copied, row.label, "review", *said, defused(row.view_position)))
            counts[row.label] += 1
    return counts, problems


def _final_labels(store: Store) -> Iterator[Any]:
    """Every path of every image with a final label, image by image."""
    query = (
        select(review_status, images, files.c.path)
        .join(images, images.c.id == review_status.c.image_id)
        .join(files, files.c.image_id == images.c.id)
        .where(review_status.c.label.is_not(None), review_status.c.label != _LEFT_OUT)
        .where(files.c.state != str(FileState.MISSING))
        .order_by(images.c.id, files.c.id)
    )
    with connect(store.engine) as connection:
        yield from connection.execute(query).all()


def _copy(row: Any, part: Path) -> str | None:
    """The path of the copy below `part`; None where the file is not the image any more."""
    try:
        source = text_to_path(row.path)
        # O_NONBLOCK: a FIFO under the name of an image would wait for a writer that never comes.
        with os.fdopen(os.open(source, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            content = file.read()
    except (OSError, ValueError):  # ValueError: a path too long to be stored whole
        return None
    if hashlib.sha256(content).hexdigest() != row.sha256:
        return None
    suffix = {"dicom": ".dcm", "png": ".png", "jpeg": ".jpg", "tiff": ".tif"}[row.format]
    folder = re.sub(r"[^\w-]", "_", row.label)  # a label is a bundle's text, and here it becomes a folder
    (part / folder).mkdir(exist_ok=True)
    name = f"{row.sha256[:24]}{suffix}"
    (part / folder / name).write_bytes(content)
    return f"{folder}/{name}"


def export_audit(settings: Settings, file: Path, since: datetime | None, actor: str) -> None:
    """Write the audit trail as CSV or JSON lines, oldest first; that it was exported is its next entry."""
    kind = file.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise Fatal(f"The audit trail is exported as .csv or .jsonl, not {str(file)!r}.", ExitCode.USAGE)
    number = 0
    with Store.open(settings.db, may_create=False) as store:
        query = select(*(audit.c[name] for name in _AUDIT)).order_by(audit.c.id)
        if since is not None:
            query = query.where(audit.c.at >= since)
        with connect(store.engine) as connection, new_file(file, _EARLIER_AUDIT) as raw:
            out = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
            writer = csv.writer(CsvLines(out), lineterminator="\r\n")
            if kind == ".csv":
                writer.writerow(_AUDIT)
            for row in connection.execution_options(yield_per=1000).execute(query):
                values = [utc_text(value) if isinstance(value, datetime) else value for value in row]
                if kind == ".csv":
                    writer.writerow([defused(value) if isinstance(value, str) else value for value in values])
                else:
                    out.write(json.dumps(dict(zip(_AUDIT, values, strict=True)), ensure_ascii=False) + "\n")
                number += 1
            out.detach()  # what the wrapper owns is closed by `new_file`
        write_audit(store, actor, "exported", detail=f"audit trail, {number} entries")
    tell(f"{number:,} entries in {file}")


def calibrate_from_reviews(settings: Settings, bundle: Path, out: Path, *, review_share: float = 0.25) -> None:
    """A new version of a bundle whose temperature and threshold fit a site's own blinded reads.

    The numbers come from the store: what this bundle said of images whose blinded readers agree, or whose dispute was
    adjudicated. The networks, the gate and what is unlike training stay. Raises Fatal where there are too few reads.
    """
    import numpy as np

    from cxrbatch.inference.bundle import load_bundle
    from cxrbatch.inference.cascade import probabilities_of
    from cxrbatch.training import metrics
    from cxrbatch.training.bundle_writer import change_bundle, change_stage
    from cxrbatch.training.conformal import class_thresholds
    from cxrbatch.training.thresholds import COVERAGE, abnormal_block, confidence_threshold, rounded_down, sureness

    loaded = load_bundle(bundle)
    stage = loaded.disease
    if out.exists():
        raise Fatal(f"{out} is there already: name a folder that is not.", ExitCode.USAGE)
    with Store.open(settings.db, may_create=False) as store:
        rows = _blinded_labels(store, loaded.manifest_sha256, stage.classes)
    labels = [label for label, *_ in rows]
    few = [name for name in stage.classes if labels.count(name) < _LEAST_OF_CLASS]
    if len(rows) < _LEAST_READS or few:
        raise Fatal(
            f"{len(rows)} image(s) have a final label by blinded readers and logits of this bundle; {_LEAST_READS} are "
            f"needed, {_LEAST_OF_CLASS} of each class"
            + (f" (too few: {', '.join(few)})." if few else ".")
            + " Make a blinded round first."
        )
    y = np.array([stage.classes.index(label) for label in labels], np.int64)
    logits = np.array([values for _, values, _, _ in rows], np.float64)
    unlike = np.array([far > 1 for _, _, far, _ in rows])
    temperature = metrics.best_temperature(logits, y)
    p, before = probabilities_of(logits, temperature), probabilities_of(logits, stage.temperature)
    abnormal, other = [value for *_, value in rows], None
    if stage.other is not None and None not in abnormal:  # None: no class is NORMAL
        probability = np.array(abnormal, np.float64)
        other = _other_again(logits, before, probability, stage.classes, stage.temperature, temperature)
    sure = sureness(stage.classes, p, other)
    threshold = confidence_threshold(sure, unlike, review_share)
    sets = class_thresholds(p, y, np.ones(len(y)), COVERAGE)
    part = out.with_name(f".{out.name}.part")  # a bundle that is half changed would load
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(bundle, part)
    version = f"{loaded.version}+site.{datetime.now(UTC):%Y%m%d}"
    reference = loaded.manifest.get("reference")
    # The confidences of the reference are those of the temperature before: all days of the site would differ from them.
    change_bundle(part, {"version": version, "reference": reference and reference | {"confidence": None}})
    chosen = f"{len(y)} images of this site, by blinded readers ({datetime.now(UTC):%Y-%m-%d})"
    change_stage(
        part,
        "disease",
        {
            "temperature": round(float(temperature), 4),
            "threshold": round(float(threshold), 4),
            "chosen_on": chosen,
            "calibration": {
                "ece_before": metrics.calibration_error(y, probabilities_of(logits, 1.0)),
                "ece_old_temperature": metrics.calibration_error(y, before),
                "ece_after": metrics.calibration_error(y, p),
                "accuracy": float((p.argmax(1) == y).mean()),
                "balanced_accuracy": metrics.balanced_accuracy(y, p.argmax(1)),
                "sent_to_review": float(((sure < threshold) | unlike).mean()),
                "site_reads": Counter(labels),
            },
            "label_set": {
                "coverage": COVERAGE,
                "thresholds": {name: rounded_down(t) for name, t in zip(stage.classes, sets, strict=True)},
                "chosen_on": chosen,
            },
            **abnormal_block(stage.classes, p, y, ["site"] * len(y), other),
        },
    )
    _extend_card(part / "CARD.md", chosen, stage.temperature, temperature, stage.threshold, threshold)
    os.replace(part, out)
    print(f"{out}: temperature {stage.temperature:g} -> {temperature:.4g}, ", end="")
    print(f"threshold {stage.threshold:g} -> {threshold:.4g}")
    print("Set `cascade` to this folder; images that are scored again are new predictions beside the old ones.")


def _other_again(
    logits: Floats, before: Floats, abnormal: Floats, classes: Sequence[str], old: float, new: float
) -> Floats:
    """(n,) the probability of none of the classes at the temperature `new`, from `abnormal` at `old`.

    The store has no logit of it, but abnormal = 1 - p(NORMAL) (1 - other), with p(NORMAL) of `before`.
    """
    import numpy as np

    from cxrbatch.inference.decision import normal_class

    normal = normal_class(classes)
    assert normal is not None  # there is no `abnormal` without
    share = np.clip(1 - (1 - abnormal) / np.maximum(before[:, normal], 1e-300), 1e-12, 1 - 1e-12)
    its_logit = old * (np.log(share / (1 - share)) + np.logaddexp.reduce(logits / old, axis=1))
    again: Floats = 1 / (1 + np.exp(np.logaddexp.reduce(logits / new, axis=1) - its_logit / new))
    return again


def _blinded_labels(
    store: Store, manifest_sha256: str, classes: Sequence[str]
) -> list[tuple[str, list[float], float, float | None]]:
    """(label, logits in the order of classes, ood score, abnormal_probability) of the newest prediction of images.

    Of those whose blinded reads agree or were adjudicated.
    """
    query = (
        select(predictions, scores.c.label.label("name"), scores.c.logit)
        .join(models, models.c.id == predictions.c.cascade_id)
        .join(scores, scores.c.prediction_id == predictions.c.id)
        .where(models.c.manifest_sha256.in_([manifest_sha256, manifest_sha256 + " exact"]), scores.c.logit.is_not(None))
        .order_by(predictions.c.id)
    )
    found: dict[int, tuple[str, list[float], float, float | None]] = {}
    with connect(store.engine) as connection:
        labels = blinded_labels(connection)
        for _, group in groupby(connection.execute(query), key=attrgetter("id")):
            rows = list(group)
            logits, image_id = {row.name: row.logit for row in rows}, rows[0].image_id
            if labels.get(image_id) in classes and logits.keys() >= set(classes):
                ordered = [logits[name] for name in classes]
                found[image_id] = labels[image_id], ordered, rows[0].ood_score or 0.0, rows[0].abnormal_probability
    return list(found.values())


def _extend_card(
    card: Path, chosen: str, old_t: float, new_t: float, old_threshold: float, new_threshold: float
) -> None:
    earlier = card.read_text(encoding="utf-8") if card.exists() else "# Model card\n"
    text = (
        "\n## Calibrated on a site's own reads\n\n"
        f"Chosen on {chosen}. The networks are unchanged; figures above are of the version before.\n\n"
        "| | before | now |\n|---|---|---|\n"
        f"| temperature | {old_t:g} | {new_t:.4g} |\n| threshold | {old_threshold:g} | {new_threshold:.4g} |\n"
    )
    card.write_text(earlier.rstrip() + "\n" + text, encoding="utf-8")
