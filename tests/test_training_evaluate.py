"""Evaluate and calibrate: the numbers are the cascade's, chosen on validation, and the bundle stays valid."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes
from cxrbatch.inference.bundle import NOT_CALIBRATED, SHIPPED, load_bundle
from cxrbatch.inference.cascade import Cascade
from cxrbatch.inference.decision import Assessment
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.inference.engines.verify import largest_difference
from cxrbatch.training.bundle_writer import change_stage
from cxrbatch.training.calibrate import calibrate
from cxrbatch.training.calibrate_gate import calibrate_gate
from cxrbatch.training.card import card_text, write_card
from cxrbatch.training.datasets import LabelledImage, find_folders, known_patients, leaked_images, split_images
from cxrbatch.training.evaluate import evaluate
from cxrbatch.training.figures import measure
from cxrbatch.training.optimisation import training_device
from cxrbatch.training.plots import plot_evaluation
from cxrbatch.training.recipes import load_recipe
from cxrbatch.training.report import print_report
from cxrbatch.training.scores import Scores, score_images
from cxrbatch.training.shortcuts import cam_outside, source_probe
from cxrbatch.types import Decision, Prediction
from factories import make_bundle
from fork_server import cxrbatch
from training_images import draw, make_folder

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


@pytest.mark.parametrize("gate_bias", [10.0, -10.0])
def test_calibrated_scores_are_the_cascades_own(tmp_path: Path, gate_bias: float) -> None:
    data = make_folder(tmp_path / "task", LABELS[:4], {"train": 6, "val": 6, "test": 4}, side=144)
    for image in sorted((data / "test").rglob("1.png")):
        Image.open(image).resize((500, 144)).save(image)  # extreme_aspect
    bundle = make_bundle(tmp_path / "bundle", gate_bias=gate_bias)
    calibrate(bundle, data)
    loaded, engine = load_bundle(bundle), TorchEngine("cpu")
    images = split_images(find_folders(data)[0].images, "test")
    scores = score_images(loaded, images, engine)
    decoded_images = [
        decode_bytes(f.path.read_bytes(), loaded.input_specs, Limits(), Identifiers(mode="drop")) for f in images
    ]
    predictions = Cascade(loaded, engine).score(decoded_images)
    assert set(scores.quality_flags) == {(), ("extreme_aspect",)}
    for row, prediction in enumerate(predictions):
        assert isinstance(prediction, Prediction)
        found = scores.assessments[row]
        assert (prediction.label, prediction.decision) == (found.label, found.decision)
        assert prediction.review_reasons == found.review_reasons
        assert prediction.is_chest == scores.passed[row]
        assert (prediction.decision is Decision.NEEDS_REVIEW) == scores.review[row]
        if scores.quality_flags[row]:
            assert scores.review[row]
        if prediction.is_chest:
            assert list(prediction.probabilities.values()) == pytest.approx(
                scores.probabilities[row].tolist(), abs=1e-5
            )
            assert scores.ood is not None and prediction.ood_score == pytest.approx(scores.ood[row], rel=1e-3)


def test_what_the_decoder_doubts_counts_as_sent_to_review(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "images", LABELS[:4], {"test": 2})  # 48 pixels a side: every one is tiny
    found = evaluate(make_bundle(tmp_path / "shut", gate_bias=-10.0), data, None, draws=5)["sets"]["images"]
    assert found["end_to_end"]["rejected_by_gate"] == 1.0 and found["end_to_end"]["sent_to_review"] == 1.0


def test_calibrate_writes_what_the_format_says_and_leaves_the_weights_alone(
    data: Path, bundle: Path, tmp_path: Path
) -> None:
    change_stage(bundle, "disease", {"chosen_on": NOT_CALIBRATED})
    before = load_bundle(bundle)
    assert "never calibrated" in before.lacks
    (tmp_path / "in").mkdir()
    scanned = cxrbatch("scan", "in", "--cascade", str(bundle), cwd=tmp_path)
    assert scanned.stderr.count("\n") == 2 and scanned.stderr.startswith(before.lacks)  # the other one: no file
    model_inputs = np.zeros((2, 64, 64), np.uint8)
    logits = TorchEngine("cpu").load(before.disease)(model_inputs)[0]
    calibrate(bundle, data)
    after = load_bundle(bundle)
    assert after.lacks == ""
    stage = after.disease
    assert stage.ood is not None and stage.ood.means.shape[0] == 4
    assert stage.ood.whitening.shape == (stage.ood.means.shape[1], 1280)
    assert "val: 24 images" in stage.manifest["chosen_on"] and stage.temperature != 1.0
    assert after.gate is not None and after.gate.manifest["review_from"] <= after.gate.threshold
    np.testing.assert_allclose(TorchEngine("cpu").load(stage)(model_inputs)[0], logits, atol=1e-5)
    assert (largest_difference(stage, TorchEngine("cpu")) or 0) < 1e-3
    assert stage.label_set is not None and stage.manifest["label_set"]["coverage"] == 0.9
    points = stage.manifest["abnormal"]["operating_points"]
    assert [p["sensitivity"] for p in points] == [0.9, 0.95, 0.99]
    assert points[0]["threshold"] >= points[2]["threshold"]
    reference = after.manifest["reference"]
    assert reference["n"] == 24 == sum(reference["decisions"].values())
    assert sum(reference["grey_mean"]["counts"]) == sum(reference["labels"].values())
    assert all(0 <= edge <= 255 for edge in reference["grey_mean"]["edges"])
    found = evaluate(bundle, data, None, split="val", draws=5)["sets"]["task"]["label_sets"]
    assert found["coverage"] >= 0.8 and 1 <= found["mean_size"] <= 4  # of the very images it was chosen on


def test_a_calibration_that_is_killed_between_two_stages_leaves_the_old_bundle(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    before = load_bundle(bundle)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("cxrbatch.training.calibrate.calibrate_gate", killed)
        calibrate(bundle, data, balance=True)
    assert load_bundle(bundle).manifest_sha256 == before.manifest_sha256
    assert {file.name for file in bundle.iterdir()} == {"manifest.json", "gate.safetensors", "disease.safetensors"}


def test_a_margin_makes_label_sets_larger_and_changes_nothing_else(data: Path, bundle: Path) -> None:
    calibrate(bundle, data)
    plain = load_bundle(bundle).disease
    calibrate(bundle, data, label_set_margin=0.09)
    wider = load_bundle(bundle).disease
    assert plain.label_set is not None and wider.label_set is not None
    assert (
        all(b <= a for a, b in zip(plain.label_set, wider.label_set, strict=True))
        and wider.label_set != plain.label_set
    )
    assert (wider.temperature, wider.threshold) == (plain.temperature, plain.threshold)
    said = wider.manifest["label_set"]
    assert (said["coverage"], said["coverage_of_split"]) == (0.9, 0.99)


def test_test_images_choose_nothing(
    data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(data, other)
    for image in (other / "test").rglob("*.png"):
        Image.fromarray(draw(1, np.random.default_rng(9))).save(image)
    calibrate(bundle, data)
    stage = load_bundle(bundle).disease
    calibrate(bundle, data)  # once more: what was before is the same, before any calibration
    measured = [one.manifest["calibration"] for one in (stage, load_bundle(bundle).disease)]
    assert measured[0]["ece_before"] == measured[1]["ece_before"] != measured[1]["ece_after"]
    told = f"temperature 1 -> {stage.temperature:.4g}, threshold 0.5 -> {stage.threshold:.4g}"
    assert told in capsys.readouterr().out
    twin = make_bundle(tmp_path / "twin")
    calibrate(twin, other)
    assert load_bundle(bundle).disease.weights.read_bytes() == load_bundle(twin).disease.weights.read_bytes()


def test_a_missing_class_cannot_be_calibrated(tmp_path: Path, bundle: Path) -> None:
    images = make_folder(tmp_path / "images", ("NORMAL", "COVID19"), {"val": 2})
    with pytest.raises(Fatal, match="PNEUMONIA, TUBERCULOSIS"):
        calibrate(bundle, images)


def test_one_image_of_each_class_is_too_few_and_training_images_of_one_class_say_nothing(
    tmp_path: Path, bundle: Path
) -> None:
    few = make_folder(tmp_path / "few", LABELS[:4], {"val": 1})
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(Fatal, match="4 val images are too few or too alike"):
        calibrate(bundle, few)
    assert (bundle / "manifest.json").read_bytes() == before
    images = make_folder(tmp_path / "images", LABELS[:4], {"val": 3})
    make_folder(tmp_path / "normal", ("NORMAL",), {"train": 2}).joinpath("train").rename(images / "train")
    calibrate(bundle, images)
    ood = load_bundle(bundle).disease.ood
    assert ood is not None and np.isfinite(ood.means).all()


def test_labels_that_are_alike_are_counted_apart() -> None:
    labels = ["NORMAL"] * 4 + ["SICK"] * 2 + ["Effusion+"] * 5 + ["Effusion-"] * 6 + ["not-chest"] * 3 + ["NOT_CHEST"]
    images = tuple(LabelledImage(Path("x"), label, "test", group=str(i)) for i, label in enumerate(labels))
    n = len(labels)
    said = (Assessment("NORMAL", 0.5, Decision.REPORTED, ()),) * n
    nothing = np.zeros((n, 2))
    scores = Scores(
        images, (), np.full(n, 0.9), None, nothing, nothing + 0.5, nothing, None, None, ((),) * n, np.zeros(n), said
    )
    found = measure(scores, ("NORMAL", "SICK"), 5)["called"]
    counted = {label: one["images"] for label, one in found.items()}
    assert counted == {"Effusion+": 5, "Effusion-": 6, "NOT_CHEST": 1, "not-chest": 3}


def test_the_test_split_is_refused(data: Path, bundle: Path) -> None:
    with pytest.raises(Fatal, match="choose nothing") as refused:
        calibrate(bundle, data, split="test")
    assert refused.value.exit_code is ExitCode.USAGE


def test_options_that_cannot_be_are_usage_and_a_gpu_that_is_missing_is_that(
    data: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    codes = []
    for mistake in (
        lambda: evaluate(bundle, data, split="tset"),
        lambda: load_recipe("nothere"),
        lambda: training_device("gpu"),
        lambda: training_device("cuda"),
    ):
        with pytest.raises(Fatal) as refused:
            mistake()
        codes.append(refused.value.exit_code)
    assert codes == [ExitCode.USAGE] * 3 + [ExitCode.DEVICE_MISSING]


def test_evaluate_reports_every_kind_of_label(
    data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(bundle, data, tmp_path / "out", draws=20)
    found = result["sets"]["task"]
    assert found["images"] == 24 and found["disease"]["images"] == 16
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
    others = {key: found[key] for key in ("images", "gate", "called")}
    plot_evaluation("others", others, found["classes"], tmp_path / "out")
    with Image.open(tmp_path / "out" / "others.png") as sheet:
        assert sheet.width > 1000
    print_report(result, Console(width=160))
    printed = capsys.readouterr().out
    assert "balanced" in printed and "OTHER: called" in printed


def test_lateral_images_judge_the_gates_second_answer(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "images", ("NORMAL", "COVID19", "LATERAL"), {"test": 2})
    sideways = evaluate(make_bundle(tmp_path / "a", frontal_bias=-10.0), data, None, draws=5)["sets"]["images"]
    assert sideways["gate"]["lateral_not_passed"] == 1.0 and sideways["gate"]["chest_passed"] == 0.0
    assert sideways["called"]["LATERAL"]["called"]["NOT_FRONTAL"] == 2
    frontal = evaluate(make_bundle(tmp_path / "b", frontal_bias=10.0), data, None, draws=5)["sets"]["images"]
    assert frontal["gate"]["lateral_not_passed"] == 0.0 and frontal["gate"]["chest_passed"] == 1.0


def test_sources_can_be_left_out(bundle: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "images", ("NORMAL", "COVID19"), {"test": 4}, manifest=True)
    assert evaluate(bundle, data, None, draws=5)["sets"]["images"]["images"] == 8
    found = evaluate(bundle, data, None, draws=5, without_sources=["site1"])
    assert found["sets"]["images"]["images"] == 4 and found["without_sources"] == ["site1"]
    with pytest.raises(Fatal, match=r"No test image in .* has a source with 'sitel'"):
        evaluate(bundle, data, None, draws=5, without_sources=["sitel"])


def test_a_closed_gate_costs_accuracy_end_to_end_only(data: Path, tmp_path: Path) -> None:
    found = evaluate(make_bundle(tmp_path / "shut", gate_bias=-10.0), data, None, draws=5)["sets"]["task"]
    assert found["end_to_end"]["accuracy"] == 0.0 and found["end_to_end"]["rejected_by_gate"] == 1.0
    assert found["disease"]["accuracy"] > 0.0 or found["disease"]["confusion"]
    assert found["gate"]["not_chest_rejected"] == 1.0


def test_unreadable_images_are_named_and_an_empty_split_is_fatal(bundle: Path, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", ("NORMAL", "COVID19"), {"test": 2})
    (images / "test" / "NORMAL" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbad")
    result = evaluate(bundle, images, None, draws=5)
    assert [Path(path).name for path, _ in result["unreadable"]] == ["bad.png"]
    assert result["sets"]["images"]["images"] == 4
    with pytest.raises(Fatal, match="split 'val'"):
        evaluate(bundle, images, None, split="val")


def test_a_stage_that_is_not_there_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="no gate stage"):
        change_stage(make_bundle(tmp_path / "b", with_gate=False), "gate", {"threshold": 0.4})


def test_the_card_says_what_was_missed_and_where_images_come_from(data: Path, bundle: Path) -> None:
    result = evaluate(bundle, data, None, draws=5)
    result["sets"] = {"external": result["sets"]["task"]}
    aims = [
        ("balanced accuracy", "external", ("disease", "balanced_accuracy"), 1.01, True),
        ("images", "external", ("images",), 1, True),
        ("never measured", "nowhere", ("x",), 1, True),
    ]
    write_card(bundle, result, sources=["nih14"], targets=aims, limits=["It fails on cats."])
    card = (bundle / "CARD.md").read_text()
    assert "**missed**" in card and "| met |" in card and "never measured" not in card
    assert "NIH Clinical Center" in card and "It fails on cats." in card
    assert card.index("external") < card.index("## How it was made")
    assert card_text(json.loads((bundle / "manifest.json").read_text()), result)


def test_leaks_are_found_by_content(tmp_path: Path) -> None:
    images = make_folder(tmp_path, ("A", "B"), {"train": 3, "test": 3})
    (images / "test" / "B" / "2.png").write_bytes((images / "train" / "A" / "0.png").read_bytes())
    assert [f.path.name for f in leaked_images(find_folders(images))] == ["2.png"]


def test_a_set_with_leaks_stands_a_second_time_without_them(bundle: Path, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", ("NORMAL", "COVID19"), {"train": 1, "test": 3})
    (images / "test" / "NORMAL" / "2.png").write_bytes((images / "train" / "NORMAL" / "0.png").read_bytes())
    sets = evaluate(bundle, images, None, draws=5)["sets"]
    assert {name: found["images"] for name, found in sets.items()} == {"images": 6, "images-leak-free": 5}
    assert sets["images-leak-free"]["disease"]["per_class"]["NORMAL"]["support"] == 2


def test_a_set_with_patients_of_train_stands_once_more_without_them(bundle: Path, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", ("NORMAL", "COVID19"), {"train": 1, "test": 3}, manifest=True)
    (images / "test" / "NORMAL" / "2.png").write_bytes((images / "train" / "NORMAL" / "0.png").read_bytes())
    table = images / "manifest.csv"
    table.write_text(table.read_text().replace("test-COVID19-0", "train-COVID19-0"))  # the patient of two test images
    result = evaluate(bundle, images, None, draws=5)
    counted = {name: found["images"] for name, found in result["sets"].items()}
    assert counted == {"images": 6, "images-leak-free": 5, "images-new-patients": 3}
    shown = Console(width=160, file=io.StringIO())
    print_report(result, shown)
    assert "without images of a patient" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_patients_are_known_of_what_was_learnt_from_only(tmp_path: Path) -> None:
    for name in ("learnt", "other"):
        make_folder(tmp_path / name, ("NORMAL", "COVID19"), {"train": 1, "test": 1})
    rows = [
        f"{name}/{split}/NORMAL/0.png,a,{patient}"
        for name, split, patient in (("learnt", "test", "p"), ("learnt", "train", "q"), ("other", "train", "p"))
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,source,group", *rows]))
    learnt, other = find_folders(tmp_path)
    assert known_patients([learnt, other], [learnt]) == []
    assert [image.group for image in known_patients([learnt, other], [other])] == ["p"]


def test_cam_mass_outside_is_a_share(data: Path, bundle: Path) -> None:
    images = split_images(find_folders(data)[0].images, "test")[:4]
    share, (low, high) = cam_outside(load_bundle(bundle).disease, images)
    assert 0 < low <= share <= high < 1


def test_the_source_probe_finds_a_planted_source_and_no_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = list(find_folders(make_folder(tmp_path, ("A", "B"), {"train": 60}, manifest=True))[0].images)
    blind = rng.normal(0, 1, (len(images), 8)).astype(np.float32)
    telling = blind + 3 * np.array([[f.source == "site1"] for f in images])
    found = source_probe(telling.astype(np.float32), images)["A"]
    assert (
        found["balanced_accuracy"] > 0.9 and found["interval"][0] <= found["balanced_accuracy"] <= found["interval"][1]
    )
    assert source_probe(blind, images)["A"]["balanced_accuracy"] < 0.8


@pytest.mark.shared
def test_the_shipped_covid3_still_has_the_accuracy_of_its_card() -> None:
    images = Path(__file__).parents[2] / "shared" / "data" / "covid3"
    if not images.is_dir():
        pytest.skip("needs ../shared/data")
    sets = evaluate(SHIPPED / "covid3", images, None, draws=5)["sets"]
    result = sets["covid3"]
    interval = load_bundle("covid3").disease.manifest["metrics"]["covid3"]["accuracy"]
    assert result["images"] == 66 and interval[1] <= result["disease"]["accuracy"] <= interval[2]
    assert sets["covid3-leak-free"]["images"] == 60


def test_a_gate_is_judged_and_calibrated_on_every_spelling_of_not_chest(tmp_path: Path, bundle: Path) -> None:
    """`train` takes such a folder, too."""
    labels = (*LABELS[:4], "not-chest", "Lateral")
    data = make_folder(tmp_path / "task", labels, {"train": 4, "val": 4, "test": 4})
    gate = evaluate(bundle, data, None, draws=5)["sets"]["task"]["gate"]
    assert (gate["chest_passed"], gate["not_chest_rejected"], gate["lateral_not_passed"]) == (1.0, 0.0, 0.0)
    calibrate(bundle, data)
    assert load_bundle(bundle).gate.manifest["chosen_on"] == "val: 20 chest images and 4 others"  # type: ignore[union-attr]


def test_without_lateral_images_the_same_images_stay_frontal(tmp_path: Path) -> None:
    """A new temperature changes every probability, and with it what a threshold means."""
    change_stage(make_bundle(tmp_path / "b", frontal_bias=1.0), "gate", {"frontal_threshold": 0.8})
    gate = load_bundle(tmp_path / "b")
    chest = np.array([0.9, 0.8, 0.4, 0.7, 0.3, 0.2, 0.6, 0.1])
    images = tuple(LabelledImage(Path("x"), label, "val") for label in ["NORMAL"] * 4 + ["NOT_CHEST"] * 4)
    n = len(images)
    scores = Scores(
        images, (), chest, np.full(n, 0.7), np.zeros((n, 4)), np.full((n, 4), 0.25), np.zeros((n, 2), np.float32),
        None, None, ((),) * n, np.zeros(n), (),
    )  # fmt: skip
    calibrate_gate(gate, scores, "val")
    after = load_bundle(gate.path).gate
    assert after is not None and after.frontal_threshold is not None and after.temperature != 1
    assert after.frontal_threshold == pytest.approx(1 / (1 + np.exp(-np.log(4) / after.temperature)), abs=1e-3)


def test_a_report_prints_names_as_they_are(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "task", ("NORMAL", "odd [ap]", "odd [x"), {"test": 2})
    result = evaluate(bundle, data, None, draws=5)
    result["unreadable"] = [["a[/b]/c.png", "no [/image]"]]
    print_report(result, Console(width=160))
    printed = capsys.readouterr().out
    assert "odd [ap]: called" in printed and "a[/b]/c.png: no [/image]" in printed
