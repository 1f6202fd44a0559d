"""A bundle that is not what its manifest says is refused in one sentence, before a weight is used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.bundle import SHIPPED, find_bundle, load_bundle
from cxrbatch.inference.engines import networks, open_engine
from cxrbatch.inference.engines.verify import check_logits, check_model_inputs, largest_difference
from cxrbatch.inference.model_spec import ARCHITECTURES
from cxrbatch.ops.models import show_model
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.training.bundle_writer import change_stage
from factories import make_bundle

CLASSES = ("NORMAL", "COVID19", "PNEUMONIA", "TUBERCULOSIS")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(Fatal, match=match) as caught:
        load_bundle(folder)
    assert caught.value.exit_code is ExitCode.BUNDLE_UNUSABLE
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in changes.items():
        target = manifest if key in manifest else manifest["stages"][-1]
        target[key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_good_one_loads_and_its_identity_covers_the_weights(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert [s.role for s in bundle.stages] == ["gate", "disease"]
    before = bundle.manifest_sha256
    edit(folder, temperature=2.0)
    assert load_bundle(folder).manifest_sha256 != before


def test_a_flipped_byte(folder: Path) -> None:
    weights = folder / "disease.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    refused(folder, "SHA-256 differs")


def test_a_flipped_byte_of_the_manifest_is_refused_wherever_it_says_something(tmp_path: Path) -> None:
    raw = (SHIPPED / "covid3" / "manifest.json").read_bytes()
    (weights,) = (SHIPPED / "covid3").glob("*.safetensors")
    (tmp_path / weights.name).symlink_to(weights)
    rng = np.random.default_rng(0)
    refusals = 0
    for place in rng.choice(len(raw), 200, replace=False):
        data = bytearray(raw)
        data[place] ^= 1 << int(rng.integers(0, 7))
        (tmp_path / "manifest.json").write_bytes(data)
        try:
            reported = load_bundle(tmp_path).manifest
        except Fatal as said:
            assert said.exit_code is ExitCode.BUNDLE_UNUSABLE
            refusals += 1
        else:
            assert reported == json.loads(raw)  # a space became another
    assert refusals > 100
    (tmp_path / "manifest.json").write_bytes(raw.replace(b'"temperature": 0.', b'"temperature": 1.'))
    refused(tmp_path, "not what was written")
    with pytest.raises(Fatal, match="not what was written"):  # nor does training make it look right again
        change_stage(tmp_path, "disease", {})


def test_a_pickle_renamed_even_with_its_hash_put_right(folder: Path) -> None:
    import hashlib

    weights = folder / "disease.safetensors"
    weights.write_bytes(pickle.dumps({"evil": print}))
    edit(folder, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    refused(folder, "not a safetensors file")


def test_classes_that_do_not_match_the_weights(folder: Path) -> None:
    edit(folder, classes=["NORMAL", "COVID19"])
    refused(folder, "4 output.s. and the manifest names 2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "mobilenet_v9"}, "no network 'mobilenet_v9'"),
        ({"model_input": {"size": 64, "fit": "pqd"}}, "no such model input"),
        ({"model_input": {"size": 64, "interpolation": "bilinearly"}}, "no such model input"),
        ({"model_input": {"size": "64"}}, "no such model input"),
        ({"model_input": {"size": 0}}, "no such model input"),
        ({"channels": float("inf")}, "not usable"),
    ],
)
def test_a_manifest_that_names_what_is_not_there(folder: Path, changes: dict[str, object], said: str) -> None:
    edit(folder, **changes)
    refused(folder, said)


def test_every_network_that_can_be_built_may_be_named() -> None:
    assert set(networks.ARCHITECTURES) == ARCHITECTURES


def test_a_manifest_from_the_future(folder: Path) -> None:
    edit(folder, format=99)
    refused(folder, "newer than this program")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "stages": 3}'])
def test_a_broken_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest.json is not usable")


def test_weights_outside_the_folder_or_missing(folder: Path) -> None:
    edit(folder, weights="../disease.safetensors")
    refused(folder, "missing")
    refused(folder.parent / "nothing", "There is no bundle")


def test_recorded_logits_are_found_again_and_other_weights_are_not(folder: Path) -> None:
    engine = open_engine("torch", "cpu")
    logits = check_logits(load_bundle(folder).disease, engine)
    edit(folder, check_logits=logits.tolist())
    assert largest_difference(load_bundle(folder).disease, engine) == 0
    edit(folder, check_logits=(logits + 1).tolist())
    assert largest_difference(load_bundle(folder).disease, engine) == pytest.approx(1, abs=1e-5)
    edit(folder, check_logits=[[1.0], "x"])
    assert largest_difference(load_bundle(folder).disease, engine) == float("inf")


def test_check_model_inputs_are_the_same_everywhere() -> None:
    import hashlib

    model_inputs = check_model_inputs(64)
    assert model_inputs.dtype == np.uint8 and model_inputs.shape == (4, 64, 64)
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in model_inputs}) == 4


def test_a_name_that_the_file_system_refuses() -> None:
    refused(Path("x" * 300), "cannot be read")


def test_the_shipped_gate_wants_anatomy_and_not_greys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gate = next(stage for stage in load_bundle("default").stages if stage.role == "gate")
    image = np.rint(draw_chest(Chest(rows=240, columns=200)) * 255).astype(np.uint8)
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 6), dtype=np.uint8)
    blobs = [np.asarray(Image.fromarray(one).resize((160, 160))) for one in coarse]
    quarters_exchanged = np.roll(image, (120, 100), (0, 1))
    model_inputs = [fit_model_input(array, gate.model_input) for array in (image, quarters_exchanged, *blobs)]
    logits, _ = open_engine("openvino", "cpu").load(gate)(np.stack(model_inputs))
    assert list(logits[:, 0] > 0) == [True] + [False] * 5


def test_a_writer_that_is_killed_before_the_manifest_leaves_the_old_bundle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_stage(folder, "disease", {"threshold": 0.25})
    before = load_bundle(folder)
    whitening, means = np.ones((2, 1280), np.float32), np.ones((4, 2), np.float32)

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt
        Path(source).rename(target)

    with monkeypatch.context() as patched:
        patched.setattr("cxrbatch.training.bundle_writer.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            change_stage(folder, "disease", {"threshold": 0.75}, (whitening, means, 2.0))
    after = load_bundle(folder)  # not refused
    assert after.manifest_sha256 == before.manifest_sha256 and after.disease.threshold == 0.25
    change_stage(folder, "disease", {"threshold": 0.75}, (whitening, means, 2.0))
    done = load_bundle(folder)
    assert done.disease.ood is not None
    assert sorted(f.name for f in folder.glob("disease*")) == [done.disease.weights.name]  # and nothing is left behind


@pytest.mark.parametrize("thresholds", [{"NORMAL": 0.1}, dict.fromkeys(CLASSES, 1.5)])
def test_label_set_thresholds_that_do_not_fit_are_refused(folder: Path, thresholds: dict[str, float]) -> None:
    edit(folder, label_set={"thresholds": dict.fromkeys(CLASSES, 0.2)})
    assert load_bundle(folder).disease.label_set == (0.2,) * 4
    edit(folder, label_set={"thresholds": thresholds})
    refused(folder, "label_set")


@pytest.mark.parametrize("changes", [{"abnormal": {"operating_points": [{}]}}, {"label_set": {"coverage": "most"}}])
def test_what_only_show_reads_is_a_sentence_too(folder: Path, changes: dict[str, dict[str, object]]) -> None:
    edit(folder, label_set={"thresholds": dict.fromkeys(CLASSES, 0.2)})
    show_model(str(folder))
    edit(folder, **{key: {"thresholds": dict.fromkeys(CLASSES, 0.2)} | value for key, value in changes.items()})
    with pytest.raises(Fatal, match="label_set or the abnormal of its disease stage") as caught:
        show_model(str(folder))
    assert caught.value.exit_code is ExitCode.BUNDLE_UNUSABLE


def test_a_gate_of_two_answers_needs_a_threshold_for_the_second(tmp_path: Path) -> None:
    two = make_bundle(tmp_path / "two", frontal_bias=3.0)
    gate = load_bundle(two).gate
    assert gate is not None and gate.classes == ("CHEST", "FRONTAL") and gate.frontal_threshold == 0.5
    manifest = json.loads((two / "manifest.json").read_text())
    del manifest["stages"][0]["frontal_threshold"]
    (two / "manifest.json").write_text(json.dumps(manifest))
    refused(two, "frontal_threshold")


@pytest.mark.parametrize("number", [1, 2])
def test_older_formats_are_still_read(folder: Path, number: int) -> None:
    edit(folder, format=number)
    bundle = load_bundle(folder)
    assert bundle.gate is not None and bundle.gate.frontal_threshold is None and bundle.disease.label_set is None


def test_a_folder_with_the_name_of_a_shipped_bundle_is_never_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cxrbatch train alveoli -o alveoli`, and then `cxrbatch evaluate alveoli`: of which of the two?"""
    monkeypatch.chdir(tmp_path)
    assert load_bundle("alveoli").path == SHIPPED / "alveoli"
    make_bundle(Path("alveoli"))
    for own in ("./alveoli", str(tmp_path / "alveoli"), "alveoli/"):
        assert load_bundle(find_bundle(own)).name == "test"
    with pytest.raises(Fatal, match=r"write \./alveoli for that one") as caught:
        find_bundle("alveoli")
    assert caught.value.exit_code is ExitCode.BUNDLE_UNUSABLE
    monkeypatch.chdir(SHIPPED)
    assert find_bundle("alveoli").samefile(SHIPPED / "alveoli")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": [float("nan")]}, "mean or the std"),
        ({"std": [0]}, "mean or the std"),
        ({"ood": {"threshold": 0}}, "unlike-training score"),
        ({"ood": {"threshold": -20.0}}, "unlike-training score"),
        ({"classes": [1, 2, 3, 4]}, "classes of its disease stage"),
    ],
)
def test_numbers_with_which_every_image_would_be_rejected_or_none_looked_at(
    folder: Path, changes: dict[str, object], said: str
) -> None:
    edit(folder, **changes)
    refused(folder, said)


@pytest.mark.parametrize("review_from", [float("nan"), 1.5, None, "none"])
def test_a_review_from_that_is_no_probability_is_refused(folder: Path, review_from: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"][0]["review_from"] = review_from
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, "review_from|not usable")
