"""Reviews back out of the store: the dataset, the audit trail, a bundle calibrated on blinded reads."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import find_bundle, load_bundle
from cxrbatch.inference.decision import Thresholds
from cxrbatch.ops.feedback import calibrate_from_reviews, export_audit, export_dataset
from cxrbatch.settings import Settings
from cxrbatch.store import CascadeIdentity, ReviewAction, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.review_images import write_audit
from cxrbatch.store.schema import images
from cxrbatch.training.datasets import find_folders
from cxrbatch.training.reference import read_reference
from cxrbatch.training.scores import assess_each
from cxrbatch.types import Decision, Prediction
from review_server import fill
from store_images import LABELS, begin, review, scored_file


def no_space(*_: Any) -> str:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_reviewed_is_a_dataset_that_training_takes(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(store_url) as store:
        fill(store, tmp_path / "incoming")
        for image_id, label in (
            (1, "NORMAL"),
            (2, "COVID19"),
            (3, "NOT_CHEST"),
            (4, "UNREADABLE"),
            (6, "NORMAL"),
            (7, "NORMAL"),
        ):
            review(store, image_id, "dr_a", ReviewAction.OVERRIDE, label)
        review(store, 5, "dr_a", ReviewAction.FLAG)
        review(store, 2, "=dr_b", ReviewAction.OVERRIDE, "COVID19")
        with connect(store.engine, write=True) as connection:
            odd = {"view_position": "=1+1", "patient_id_hash": "@kept as it is"}
            connection.execute(sa.update(images).where(images.c.id == 2).values(odd))
        write_audit(store, "dr_a", "viewed", path="/in/a\r=1+1.png")
    (tmp_path / "incoming" / "image_5.png").write_bytes(b"other bytes")
    (tmp_path / "incoming" / "image_50.png").unlink()
    os.mkfifo(tmp_path / "incoming" / "image_50.png")
    settings, out = Settings(db=store_url), tmp_path / "dataset"
    with monkeypatch.context() as full:
        full.setattr("cxrbatch.ops.feedback.utc_text", no_space)
        with pytest.raises(OSError, match="No space"):
            export_dataset(settings, out, "somebody")
    assert sorted(path.name for path in tmp_path.iterdir() if "dataset" in path.name) == []
    export_dataset(settings, out, "somebody")
    assert sorted(str(path.relative_to(out).parent) for path in out.glob("*/*")) == ["COVID19", "NORMAL", "NOT_CHEST"]
    with (out / "manifest.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["label"] for row in rows] == ["NORMAL", "COVID19", "NOT_CHEST"]
    assert rows[1]["decided_by"] == "'=dr_b, dr_a"
    assert (rows[1]["view_position"], rows[1]["group"]) == ("'=1+1", "'@kept as it is")
    (folder,) = find_folders(out)
    assert {(image.label, image.source) for image in folder.images} == {(row["label"], "review") for row in rows}
    with pytest.raises(Fatal, match="is there already"):
        export_dataset(settings, out, "somebody")
    export_audit(settings, tmp_path / "audit.jsonl", None, "somebody")
    entries = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (entries[-1]["event"], entries[-1]["actor"]) == ("exported", "somebody")
    export_audit(settings, tmp_path / "audit.csv", None, "somebody")
    with (tmp_path / "audit.csv").open(newline="") as lines:
        written = list(csv.DictReader(lines))
    assert len(written) == len(entries) + 1
    assert "/in/a\r'=1+1.png" in {row["path"] for row in written}, "one cell, of which no line is a formula"
    export_audit(settings, tmp_path / "audit.csv", None, "somebody")  # an earlier one is replaced
    (tmp_path / "theirs.csv").write_text("patient,result\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "theirs.csv")
    os.mkfifo(tmp_path / "fifo.csv")
    for name in ("theirs.csv", "link.csv", "fifo.csv"):
        with pytest.raises(Fatal, match=r"there already|cannot be written"):
            export_audit(settings, tmp_path / name, None, "somebody")
    assert (tmp_path / "theirs.csv").read_text() == "patient,result\n"
    with pytest.raises(Fatal, match="csv or"):
        export_audit(settings, tmp_path / "audit.txt", None, "somebody")


def test_a_bundle_is_calibrated_on_blinded_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    bundle = load_bundle("default")
    classes = bundle.disease.classes
    assert set(classes) == set(LABELS)
    settings = Settings(db=f"sqlite:///{tmp_path / 's.db'}")
    identity = CascadeIdentity("default", "1", bundle.manifest_sha256, "{}", ("disease",), ("x",))
    with Store.open(settings.db) as store:
        run = begin(store, identity)
        outcomes = [scored_file(f"/in/{number}", LABELS[number % 4], 0.9) for number in range(60)]
        store.record(run.run_id, run.cascade_id, outcomes)
        with pytest.raises(Fatal, match="Make a blinded round first"):
            calibrate_from_reviews(settings, find_bundle("default"), tmp_path / "new")
        ids = {row.path: number for number, row in enumerate(store.results())}
        assert len(ids) == 60
        for known in (store.everything_about(f"/in/{number}")[0] for number in range(60)):
            said = known.result["label"]
            wrong = known.file["id"] % 5 == 0
            label = LABELS[(LABELS.index(said) + 1) % 4] if wrong else said
            review(store, known.file["image_id"], "dr_a", ReviewAction.OVERRIDE, label, blinded=True)
    source = tmp_path / "source"
    shutil.copytree(find_bundle("default"), source)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr("cxrbatch.training.bundle_writer.change_stage", fail)
        calibrate_from_reviews(settings, source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    calibrate_from_reviews(settings, source, tmp_path / "new")
    made = load_bundle(tmp_path / "new")
    assert made.version.startswith(f"{bundle.version}+site.")
    assert made.manifest_sha256 != bundle.manifest_sha256
    assert made.disease.temperature != bundle.disease.temperature
    assert "60 images of this site" in (made.path / "CARD.md").read_text()
    assert load_bundle(source).manifest_sha256 == bundle.manifest_sha256, "the old one is as it was"


def test_an_export_of_the_rows_is_in_the_audit_trail(store_url: str, tmp_path: Path) -> None:
    with Store.open(store_url) as store:
        fill(store, tmp_path / "incoming")
    for name in ("r\udcfcckblick.csv", "rows.csv"):
        made = CliRunner().invoke(app, ["--db", store_url, "export", str(tmp_path / name)])
        assert made.exit_code == 0, (made.output, made.exception)
    export_audit(Settings(db=store_url), tmp_path / "audit.jsonl", None, "somebody")
    odd, entry = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert "r\ufffdckblick.csv" in odd["detail"]
    assert (entry["event"], entry["detail"]) == ("exported", f"8 row(s) to {tmp_path / 'rows.csv'}")


@pytest.mark.parametrize("option", [["--balance"], ["--label-set-margin", "0.04"], ["--split", "site"]])
def test_reads_of_a_site_take_no_options_of_a_collection(option: list[str], tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    result = CliRunner().invoke(app, ["calibrate", "default", "--from-reviews", "-o", new, *option])
    assert isinstance(result.exception, Fatal) and result.exception.exit_code == ExitCode.USAGE
    assert "--data DIR" in str(result.exception)


def test_a_site_gets_the_review_share_it_asks_for_and_points_that_count_what_is_none_of_the_classes(
    tmp_path: Path,
) -> None:
    """Of a bundle that knows `other`, whose NORMAL goes to review for it, and of images unlike its training."""
    bundle = load_bundle("default")
    old, classes = bundle.disease.temperature, bundle.disease.classes
    rng = np.random.default_rng(0)
    n = 400
    y = rng.integers(0, 4, n)
    logits = rng.normal(0, 1, (n, 5)) + 2.5 * np.eye(5)[y]  # the last one is `other`
    far = np.where(rng.random(n) < 0.1, rng.uniform(1.01, 3, n), rng.uniform(0.3, 1, n))

    def at(temperature: float) -> tuple[np.ndarray, np.ndarray]:
        p, all_five = (
            np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits[:, :4] / temperature, logits / temperature)
        )
        return p, all_five[:, 4]

    p, other = at(old)
    abnormal = 1 - p[:, 0] * (1 - other)
    settings = Settings(db=f"sqlite:///{tmp_path / 's.db'}")
    with Store.open(settings.db) as store:
        run = begin(store, CascadeIdentity("default", "1", bundle.manifest_sha256, "{}", ("disease",), ("x",)))
        outcomes = []
        for i in range(n):
            one = scored_file(f"/in/{i:03}", LABELS[int(p[i].argmax())], float(p[i].max()))
            assert isinstance(one.prediction, Prediction)
            said = replace(
                one.prediction,
                logits=dict(zip(classes, logits[i].tolist(), strict=False)),
                probabilities=dict(zip(classes, p[i].tolist(), strict=True)),
                ood_score=float(far[i]),
                abnormal_probability=float(abnormal[i]),
            )
            outcomes.append(replace(one, prediction=said))
        store.record(run.run_id, run.cascade_id, outcomes)
        for i in range(n):
            image_id = store.everything_about(f"/in/{i:03}")[0].file["image_id"]
            review(store, image_id, "dr_a", ReviewAction.OVERRIDE, LABELS[int(y[i])], blinded=True)
    calibrate_from_reviews(settings, find_bundle("default"), tmp_path / "new", review_share=0.3)
    new = load_bundle(tmp_path / "new")
    p, other = at(new.disease.temperature)
    found = assess_each(replace(Thresholds.of(new), gate=None), None, p, far, [()] * n, other=other)
    sent = np.mean([one.decision is Decision.NEEDS_REVIEW for one in found])
    assert sent == pytest.approx(0.3, abs=0.01)
    assert new.disease.manifest["calibration"]["sent_to_review"] == pytest.approx(sent, abs=0.005)
    abnormal = np.array([one.abnormal_probability for one in found])
    for point in new.disease.manifest["abnormal"]["operating_points"]:
        assert (abnormal[y != 0] >= point["threshold"]).mean() == pytest.approx(point["sensitivity"], abs=0.01)
        assert (abnormal[y == 0] < point["threshold"]).mean() == pytest.approx(point["specificity"], abs=0.01)
    reference = read_reference(new.manifest)
    assert reference is not None and reference.ood_score is not None
    assert reference.confidence is None, "at another temperature they are others"


@pytest.mark.parametrize("how", [["drift", "--accept", "--json"], ["drift", "--accept", "--png", "x.png"]])
def test_what_accepts_days_prints_no_comparison(how: list[str]) -> None:
    result = CliRunner().invoke(app, how)
    assert isinstance(result.exception, Fatal) and result.exception.exit_code == ExitCode.USAGE
    assert "--accept compares nothing" in str(result.exception)


def test_a_dataset_of_a_part_is_refused_and_not_the_whole(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--reviewed", "--as-dataset", str(tmp_path / "d"), "--under", "/in"])
    assert isinstance(result.exception, Fatal) and result.exception.exit_code == ExitCode.USAGE
    assert "leave --under out" in str(result.exception)


def test_a_shipped_bundle_is_not_changed_in_place(tmp_path: Path) -> None:
    for command in (["calibrate", "default", "--data", str(tmp_path)], ["models", "add-gate", "default"]):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, Fatal) and result.exception.exit_code == ExitCode.USAGE
        assert "change the copy" in str(result.exception)
