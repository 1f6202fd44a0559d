"""Evaluate and calibrate: the numbers are the cascade's own, chosen on validation, and the bundle keeps working."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cxrbatch.bundles import SHIPPED, load_bundle
from cxrbatch.cascade import Cascade
from cxrbatch.decode import Identifiers, Limits, decode_bytes
from cxrbatch.engines.torch_engine import TorchEngine
from cxrbatch.engines.verify import largest_difference
from cxrbatch.errors import Fatal
from cxrbatch.nouns import Decision, Verdict
from cxrbatch.training.bundle_writer import change_stage
from cxrbatch.training.calibrate import calibrate
from cxrbatch.training.card import card_text, write_card
from cxrbatch.training.datasets import find_folders, leaked_films, split_films
from cxrbatch.training.evaluate import evaluate
from cxrbatch.training.plots import plot_evaluation
from cxrbatch.training.report import print_report
from cxrbatch.training.scores import score_films
from cxrbatch.training.shortcuts import cam_outside, source_probe
from making import make_bundle
from training_films import draw, make_folder

LABELS = ("NORMAL", "COVID19", "PNEUMONIA", "TURBERCULOSIS", "NOT_CHEST", "OTHER")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("evaluate", "calibrate"):  # converting networks for OpenVINO would take most of the time
        monkeypatch.setattr(f"cxrbatch.training.{module}.open_engine", lambda *_: TorchEngine("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "task", LABELS, {"train": 6, "val": 6, "test": 4})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_calibrated_scores_are_the_cascades_own(data: Path, bundle: Path) -> None:
    calibrate(bundle, data)
    loaded, engine = load_bundle(bundle), TorchEngine("cpu")
    films = split_films(find_folders(data)[0].films, "test")
    scores = score_films(loaded, films, engine)
    images = [decode_bytes(f.path.read_bytes(), loaded.plane_specs, Limits(), Identifiers(mode="drop")) for f in films]
    verdicts = Cascade(loaded, engine).score(images)
    for row, verdict in enumerate(verdicts):
        assert isinstance(verdict, Verdict)
        if images[row].facts.quality_flags:
            continue  # the decoder's doubts are not the model's
        assert verdict.is_chest == scores.passed[row]
        assert (verdict.decision is Decision.NEEDS_REVIEW) == scores.review[row]
        if verdict.is_chest:
            assert list(verdict.probabilities.values()) == pytest.approx(scores.probabilities[row].tolist(), abs=1e-5)
            assert scores.ood is not None and verdict.ood_score == pytest.approx(scores.ood[row], rel=1e-3)


def test_calibrate_writes_what_the_format_says_and_leaves_the_weights_alone(data: Path, bundle: Path) -> None:
    before = load_bundle(bundle)
    planes = np.zeros((2, 64, 64), np.uint8)
    logits = TorchEngine("cpu").load(before.disease)(planes)[0]
    calibrate(bundle, data)
    after = load_bundle(bundle)
    stage = after.disease
    assert stage.ood is not None and stage.ood.means.shape[0] == 4
    assert stage.ood.whitening.shape == (stage.ood.means.shape[1], 1280)
    assert "val: 24 films" in stage.manifest["chosen_on"] and stage.temperature != 1.0
    assert after.gate is not None and after.gate.manifest["review_from"] <= after.gate.threshold
    np.testing.assert_allclose(TorchEngine("cpu").load(stage)(planes)[0], logits, atol=1e-5)
    assert (largest_difference(stage, TorchEngine("cpu")) or 0) < 1e-3


def test_test_films_choose_nothing(data: Path, bundle: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(data, other)
    for film in (other / "test").rglob("*.png"):
        Image.fromarray(draw(1, np.random.default_rng(9))).save(film)
    calibrate(bundle, data)
    twin = make_bundle(tmp_path / "twin")
    calibrate(twin, other)
    assert (bundle / "disease.safetensors").read_bytes() == (twin / "disease.safetensors").read_bytes()


def test_a_missing_class_cannot_be_calibrated(tmp_path: Path, bundle: Path) -> None:
    films = make_folder(tmp_path / "films", ("NORMAL", "COVID19"), {"val": 2})
    with pytest.raises(Fatal, match="PNEUMONIA, TUBERCULOSIS"):
        calibrate(bundle, films)


def test_the_test_split_is_refused(data: Path, bundle: Path) -> None:
    with pytest.raises(Fatal, match="choose nothing"):
        calibrate(bundle, data, split="test")


def test_evaluate_reports_every_kind_of_label(
    data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(bundle, data, tmp_path / "out", draws=20)
    found = result["sets"]["task"]
    assert found["films"] == 24 and found["disease"]["films"] == 16
    assert set(found["called"]) == {"NOT_CHEST", "OTHER"}
    assert found["gate"]["chest_passed"] == 1.0 and found["gate"]["not_chest_rejected"] == 0.0
    assert np.sum(found["disease"]["confusion"]) == 16
    assert 0 <= found["end_to_end"]["sent_to_review"] <= 1
    assert all(low <= r["recall"] <= high and low < high for r in found["sources"] for low, high in [r["interval"]])
    low, high = found["disease"]["intervals"]["accuracy"]
    assert low <= found["disease"]["accuracy"] <= high
    for part in (found["end_to_end"], found["called"]["OTHER"], found["gate"]):
        for name, (low, high) in part["intervals"].items():
            assert low <= part[name] <= high or part[name] != part[name], name
    assert found["gate"]["intervals"]["not_chest_rejected"] == pytest.approx([0.0, 0.6024], abs=1e-3)  # none of four
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["sets"]["task"]["disease"]["confusion"] == found["disease"]["confusion"]
    with Image.open(tmp_path / "out" / "task.png") as sheet:
        assert sheet.width > 1000
    assert [sum(counts) for counts in found["gate"]["histogram"].values()] == [20, 4]  # chest, and not
    others = {key: found[key] for key in ("films", "gate", "called")}
    plot_evaluation("others", others, found["classes"], tmp_path / "out")
    with Image.open(tmp_path / "out" / "others.png") as sheet:
        assert sheet.width > 1000
    print_report(result, Console(width=160))
    printed = capsys.readouterr().out
    assert "balanced" in printed and "OTHER: called" in printed


def test_a_closed_gate_costs_accuracy_end_to_end_only(data: Path, tmp_path: Path) -> None:
    found = evaluate(make_bundle(tmp_path / "shut", gate_bias=-10.0), data, None, draws=5)["sets"]["task"]
    assert found["end_to_end"]["accuracy"] == 0.0 and found["end_to_end"]["rejected_by_gate"] == 1.0
    assert found["disease"]["accuracy"] > 0.0 or found["disease"]["confusion"]
    assert found["gate"]["not_chest_rejected"] == 1.0


def test_unreadable_films_are_named_and_an_empty_split_is_fatal(bundle: Path, tmp_path: Path) -> None:
    films = make_folder(tmp_path / "films", ("NORMAL", "COVID19"), {"test": 2})
    (films / "test" / "NORMAL" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbad")
    result = evaluate(bundle, films, None, draws=5)
    assert [Path(path).name for path, _ in result["unreadable"]] == ["bad.png"]
    assert result["sets"]["films"]["films"] == 4
    with pytest.raises(Fatal, match="split 'val'"):
        evaluate(bundle, films, None, split="val")


def test_a_stage_that_is_not_there_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="no gate stage"):
        change_stage(make_bundle(tmp_path / "b", with_gate=False), "gate", {"threshold": 0.4})


def test_the_card_says_what_was_missed_and_where_films_come_from(data: Path, bundle: Path) -> None:
    result = evaluate(bundle, data, None, draws=5)
    result["sets"] = {"external": result["sets"]["task"]}
    aims = [
        ("balanced accuracy", "external", ("disease", "balanced_accuracy"), 1.01, True),
        ("films", "external", ("films",), 1, True),
        ("never measured", "nowhere", ("x",), 1, True),
    ]
    write_card(bundle, result, sources=["nih14"], targets=aims, limits=["It fails on cats."])
    card = (bundle / "CARD.md").read_text()
    assert "**missed**" in card and "| met |" in card and "never measured" not in card
    assert "NIH Clinical Center" in card and "It fails on cats." in card
    assert card.index("external") < card.index("## How it was made")
    assert card_text(json.loads((bundle / "manifest.json").read_text()), result)


def test_leaks_are_found_by_content(tmp_path: Path) -> None:
    films = make_folder(tmp_path, ("A", "B"), {"train": 3, "test": 3})
    (films / "test" / "B" / "2.png").write_bytes((films / "train" / "A" / "0.png").read_bytes())
    assert [f.path.name for f in leaked_films(find_folders(films))] == ["2.png"]


def test_a_set_with_leaks_stands_a_second_time_without_them(bundle: Path, tmp_path: Path) -> None:
    films = make_folder(tmp_path / "films", ("NORMAL", "COVID19"), {"train": 1, "test": 3})
    (films / "test" / "NORMAL" / "2.png").write_bytes((films / "train" / "NORMAL" / "0.png").read_bytes())
    sets = evaluate(bundle, films, None, draws=5)["sets"]
    assert {name: found["films"] for name, found in sets.items()} == {"films": 6, "films-leak-free": 5}
    assert sets["films-leak-free"]["disease"]["per_class"]["NORMAL"]["support"] == 2


def test_cam_mass_outside_is_a_share(data: Path, bundle: Path) -> None:
    films = split_films(find_folders(data)[0].films, "test")[:4]
    share, (low, high) = cam_outside(load_bundle(bundle).disease, films)
    assert 0 < low <= share <= high < 1


def test_the_source_probe_finds_a_planted_source_and_no_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    films = list(find_folders(make_folder(tmp_path, ("A", "B"), {"train": 60}, manifest=True))[0].films)
    blind = rng.normal(0, 1, (len(films), 8)).astype(np.float32)
    telling = blind + 3 * np.array([[f.source == "site1"] for f in films])
    found = source_probe(telling.astype(np.float32), films)["A"]
    assert (
        found["balanced_accuracy"] > 0.9 and found["interval"][0] <= found["balanced_accuracy"] <= found["interval"][1]
    )
    assert source_probe(blind, films)["A"]["balanced_accuracy"] < 0.8


@pytest.mark.shared
def test_the_shipped_covid3_still_has_the_accuracy_of_its_card() -> None:
    films = Path(__file__).parents[2] / "shared" / "data" / "covid3"
    if not films.is_dir():
        pytest.skip("needs ../shared/data")
    sets = evaluate(SHIPPED / "covid3", films, None, draws=5)["sets"]
    result = sets["covid3"]
    told = load_bundle("covid3").disease.manifest["metrics"]["covid3"]["accuracy"]
    assert result["films"] == 66 and told[1] <= result["disease"]["accuracy"] <= told[2]
    assert sets["covid3-leak-free"]["films"] == 60
