"""Reviews back out of the store: the dataset, the audit trail, a bundle calibrated on blinded reads."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import find_bundle, load_bundle
from cxrbatch.ops.feedback import calibrate_from_reviews, export_audit, export_dataset
from cxrbatch.settings import Settings
from cxrbatch.store import CascadeIdentity, ReviewAction, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.review_images import write_audit
from cxrbatch.store.schema import images
from cxrbatch.training.datasets import find_folders
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


@pytest.mark.parametrize("option", [["--balance"], ["--label-set-margin", "0.04"]])
def test_reads_of_a_site_take_no_options_of_a_collection(option: list[str], tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    result = CliRunner().invoke(app, ["calibrate", "default", "--from-reviews", "-o", new, *option])
    assert isinstance(result.exception, Fatal) and result.exception.exit_code == ExitCode.USAGE
    assert "--data DIR" in str(result.exception)
