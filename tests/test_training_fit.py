"""Training: the same seed gives the same weights, a kill costs one epoch at most, NaN stops it, and it learns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines import tolerance
from cxrbatch.inference.engines.networks import build_network
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.inference.engines.verify import largest_difference
from cxrbatch.training import backbones
from cxrbatch.training.backbones import freeze, start_network
from cxrbatch.training.bundle_writer import LICENCE
from cxrbatch.training.checkpoint import Progress, load_checkpoint
from cxrbatch.training.fit import train
from cxrbatch.training.recipes import Schedule
from cxrbatch.training.schedules import learning_rate_of, watch_plateau
from training_images import make_folder, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), manifest=True)


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(load_bundle(bundle).disease.weights)


def metrics(bundle: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (bundle / "training" / "disease-metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_a_bundle_that_loads_and_everything_beside_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path / "r.toml", ("batch = 8", "batch = 8\nclass_grid = true\naverage = 0.9\nmixup = 0.2\nmixstyle = 0.5")
    )
    train(recipe, images, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    stage = bundle.disease
    assert stage.classes == ("NORMAL", "SICK") and stage.model_input.size == 32
    assert stage.manifest["training"]["recipe"] == "small" and len(stage.manifest["check_logits"]) == 4
    work = tmp_path / "bundle" / "training"
    for name in ("disease-curves.png", "disease-class-grid.png", "unreadable.txt"):
        assert (work / name).is_file(), name
    assert [e["epoch"] for e in metrics(tmp_path / "bundle")] == [0, 1]
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "validation loss" in printed and "accuracy" in printed
    assert "never calibrated" in bundle.lacks
    made = tmp_path / "bundle"
    assert f"Next: cxrbatch calibrate {made} --data {images}\nIt has no gate" in printed
    assert f"first: cxrbatch models add-gate {made}\n" in printed
    assert (bundle.version, bundle.manifest["licence"]) == ("0.1.0", LICENCE)


def test_it_learns(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("epochs = 2", "epochs = 6"), ('"style"', '"none"'))
    train(recipe, images, tmp_path / "bundle")
    assert max(e["train_accuracy"] for e in metrics(tmp_path / "bundle")) > 0.9


def test_it_learns_in_whole_numbers(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.toml",
        ("epochs = 2", "epochs = 6"),
        ('"style"', '"none"'),
        ('"mobilenet_v2"', '"mobilenet_v2_int8"'),
        ("channels = 1", 'channels = 1\nnormalise = "int8"'),
    )
    train(recipe, images, tmp_path / "bundle")
    assert max(e["train_accuracy"] for e in metrics(tmp_path / "bundle")) > 0.9
    stage = load_bundle(tmp_path / "bundle").disease
    assert stage.int8 and stage.mean[0] * 255 == pytest.approx(128)
    assert largest_difference(stage, OpenVinoEngine()) < tolerance(stage)


def test_killed_and_resumed_is_the_same_as_unbroken(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("epochs = 2", "epochs = 3"))
    train(recipe, images, tmp_path / "whole")
    code = (
        "import torch; torch.set_num_threads(1); from pathlib import Path; from cxrbatch.training.fit import train;"
        f"train({str(recipe)!r}, Path({str(images)!r}), Path({str(tmp_path / 'broken')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("epoch 1/3")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    train(recipe, images, tmp_path / "broken")
    assert [e["epoch"] for e in metrics(tmp_path / "broken")] == [0, 1, 2]
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_a_finished_run_is_not_trained_again_unless_asked(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml")
    train(recipe, images, tmp_path / "bundle", epochs=1)
    before, checkpoint = metrics(tmp_path / "bundle"), tmp_path / "bundle/training/disease-checkpoint.safetensors"
    written = checkpoint.stat().st_mtime_ns
    train(recipe, images, tmp_path / "bundle", epochs=1)
    assert metrics(tmp_path / "bundle") == before and checkpoint.stat().st_mtime_ns == written
    train(recipe, images, tmp_path / "bundle", epochs=1, resume=False)
    assert metrics(tmp_path / "bundle")[0]["train_loss"] == before[0]["train_loss"]


def test_a_loss_that_is_no_number_stops_and_says_at_which_step(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("1e-3", "1e30"))
    with pytest.raises(Fatal, match=r"at step \d+"):
        train(recipe, images, tmp_path / "bundle")


def test_a_loss_that_is_no_number_only_after_the_last_step_stops_too(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("1e-3", "1e30"), ("batch = 8", "batch = 64"))  # one step an epoch
    with pytest.raises(Fatal, match="validation is nan after step 1 "):
        train(recipe, images, tmp_path / "bundle", epochs=1)
    assert not (tmp_path / "bundle" / "manifest.json").exists()


def test_a_trial_of_an_epoch_is_not_gone_on_from(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("[optimiser]", "[[phases]]\nepochs = 1\nfrozen = 3\n[optimiser]"))
    train(recipe, images, tmp_path / "bundle", epochs=1)
    assert "epoch 2/2" in capsys.readouterr().out
    train(recipe, images, tmp_path / "bundle")
    printed = capsys.readouterr().out
    assert "starts anew" in printed and "epoch 1/3" in printed


def test_a_limit_holds_for_what_an_epoch_draws_and_a_trial_with_it_is_not_gone_on_from(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balanced = 'batch = 8\nsampling = "balanced"\nsamples = 72'
    recipe = write_recipe(tmp_path / "r.toml", ("batch = 8", balanced), ("epochs = 2", "epochs = 1"))
    train(recipe, images, tmp_path / "bundle", limit=24)  # as many as there are, so only the draws are fewer
    assert _steps(tmp_path / "bundle") == 3
    train(recipe, images, tmp_path / "bundle")
    assert "starts anew" in capsys.readouterr().out and _steps(tmp_path / "bundle") == 9


def _steps(bundle: Path) -> int:
    return load_checkpoint(bundle / "training/disease-checkpoint.safetensors")[0].step


def test_a_bundle_in_the_current_folder_has_that_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("epochs = 2", "epochs = 1"))
    images, here = make_folder(tmp_path / "images", counts={"train": 2, "val": 1}), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    train(recipe, images, Path())
    assert load_bundle(here).name == "here"


def test_nothing_is_written_among_files_that_are_no_bundle(images: Path, tmp_path: Path) -> None:
    recipe, home = write_recipe(tmp_path / "r.toml"), tmp_path / "home"
    (home / "training").mkdir(parents=True)  # the folder's name says nothing
    (home / "notes.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "broken" / "manifest.json").write_text("[]")
    refused = {
        "home": "holds other files",
        "r.toml": "not a folder",
        "link": "not a folder",
        "broken": "not a manifest",
    }
    for out, why in refused.items():
        with pytest.raises(Fatal, match=why):
            train(recipe, images, tmp_path / out)
    assert sorted(p.name for p in home.rglob("*")) == ["notes.txt", "training"]


def test_a_gate_and_a_disease_model_share_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_folder(tmp_path / "images", ("NORMAL", "SICK", "NOT_CHEST"), {"train": 6, "val": 4})
    gate = write_recipe(
        tmp_path / "gate.toml",
        ('role = "disease"', 'role = "gate"\nversion = "1.0.0"\nlicence = "CC-BY-4.0"'),
        ("[[phases]]", '[classes]\nCHEST = ["NORMAL", "SICK"]\nNOT_CHEST = ["NOT_CHEST"]\n[[phases]]'),
    )
    train(gate, images, tmp_path / "bundle", epochs=1)
    classes = '[classes]\nNORMAL = ["NORMAL"]\nSICK = ["SICK"]\n[[phases]]'
    assert "Next: train a disease model into the same folder" in capsys.readouterr().out
    newer = ("batch = 8", 'batch = 8\nversion = "1.1.0"')
    train(write_recipe(tmp_path / "r.toml", ("[[phases]]", classes), newer), images, tmp_path / "bundle", epochs=1)
    assert "no gate" not in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.version, bundle.manifest["licence"]) == ("1.1.0", "CC-BY-4.0")  # what is not said stays
    assert bundle.gate is not None and bundle.gate.classes == ("CHEST",)
    assert bundle.disease.classes == ("NORMAL", "SICK")


@pytest.mark.parametrize("name", ["covid3", "gate", "disease"])
def test_the_literal_recipes_run_as_they_stand_on_a_few_images(name: str, tmp_path: Path) -> None:
    from cxrbatch.training.recipes import load_recipe, recipe_file

    images = make_folder(tmp_path / "images", tuple(load_recipe(name).classes), {"train": 5, "val": 2})
    smaller = recipe_file(name).read_text().replace('"imagenet"', '"none"')
    smaller = smaller.replace("size = 446", "size = 64").replace("size = 224", "size = 64")
    (tmp_path / "literal.toml").write_text(smaller)
    train(tmp_path / "literal.toml", images, tmp_path / "bundle", epochs=1)
    role = load_recipe(name).role
    stage = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["stages"][0]
    assert (stage["role"], stage["channels"]) == (role, 3)
    epochs = (tmp_path / "bundle" / "training" / f"{role}-metrics.jsonl").read_text().splitlines()
    assert len(epochs) == len(load_recipe(name).phases)


def test_what_was_held_out_of_train_is_what_calibrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxrbatch.training.calibrate import calibrate

    monkeypatch.setattr("cxrbatch.training.calibrate.open_engine", lambda *_: TorchEngine("cpu"))
    images = make_folder(tmp_path / "images", counts={"train": 20})
    train(write_recipe(tmp_path / "r.toml"), images, tmp_path / "bundle", epochs=1)
    before = load_bundle(tmp_path / "bundle").disease
    assert before.manifest["training"]["images"]["val"] == 8
    calibrate(tmp_path / "bundle", images)
    assert "val: 8 images" in load_bundle(tmp_path / "bundle").disease.manifest["chosen_on"]
    for label in ("NORMAL", "SICK"):  # a larger folder would give another split: images that training has learnt from
        shutil.copy(images / "train" / label / "0.png", images / "train" / label / "new.png")
    with pytest.raises(Fatal, match="not those that this bundle was trained on"):
        calibrate(tmp_path / "bundle", images)
    assert "reference" in load_bundle(tmp_path / "bundle").manifest
    train(write_recipe(tmp_path / "r.toml"), images, tmp_path / "bundle", epochs=1)
    assert "reference" not in load_bundle(tmp_path / "bundle").manifest, "it was of the network before"


def test_what_was_held_out_of_other_spellings_calibrates_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxrbatch.training.calibrate import calibrate

    monkeypatch.setattr("cxrbatch.training.calibrate.open_engine", lambda *_: TorchEngine("cpu"))
    images = make_folder(tmp_path / "images", counts={"train": 20})
    (images / "train" / "NORMAL").rename(images / "train" / "HEALTHY")
    shutil.copytree(images / "train" / "HEALTHY", images / "train" / "NORMAL")
    recipe = write_recipe(tmp_path / "r.toml")
    recipe.write_text(recipe.read_text() + '\n[classes]\nNORMAL = ["NORMAL", "HEALTHY"]\nSICK = ["SICK"]\n')
    train(recipe, images, tmp_path / "bundle", epochs=1)
    calibrate(tmp_path / "bundle", images)
    assert "calibration" in load_bundle(tmp_path / "bundle").disease.manifest


def test_frozen_blocks_do_not_move() -> None:
    net = build_network("mobilenet_v2", 1, 2).train()
    freeze(net, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learning_rate = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(torch.randn(4, 1, 64, 64))[0].square().sum().backward()
    learning_rate.step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith(("features.0.", "features.1.", "features.2.")) for k in moved)


def test_pretrained_weights_come_from_a_file_with_a_new_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = build_network("mobilenet_v2", 3, 5).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    net = start_network("mobilenet_v2", 1, 2, str(tmp_path / "w.safetensors"))
    first = "features.0.0.weight"
    torch.testing.assert_close(net.state_dict()[first], state[first].sum(1, keepdim=True))
    assert net.state_dict()["classifier.1.weight"].shape == (2, 1280)
    with pytest.raises(Fatal, match="not those of a mobilenet_v3_large"):
        start_network("mobilenet_v3_large", 1, 2, str(tmp_path / "w.safetensors"))
    with pytest.raises(Fatal, match="do not exist"):
        start_network("mobilenet_v2", 1, 2, str(tmp_path / "none.safetensors"))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Fatal, match="not a safetensors file"):
        start_network("mobilenet_v2", 1, 2, str(tmp_path / "pickle.safetensors"))


def momenta(net: torch.nn.Module) -> set[float | None]:
    return {module.momentum for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)}


def test_batch_norm_follows_within_a_short_run_unless_imagenets_statistics_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = start_network("mobilenet_v3_large", 1, 2, "none")
    assert momenta(net) == {0.1}
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert momenta(start_network("mobilenet_v3_large", 1, 2, str(tmp_path / "w.safetensors"))) == {0.1}
    monkeypatch.setattr(backbones, "_download", lambda _: net.state_dict())
    assert momenta(start_network("mobilenet_v3_large", 1, 2, "imagenet")) == {0.01}, "as published"


def test_rates_fall_as_the_schedules_say() -> None:
    step = Schedule("step", milestones=(4, 6))
    assert [learning_rate_of(step, 1.0, e, 0, 1, 1.0) for e in (0, 3, 4, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = Schedule("cosine", warm_up=10)
    rates = [learning_rate_of(cosine, 1.0, 0, s, 100, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1) and rates[-1] < 0.02
    assert np.all(np.diff(rates[11:]) < 0)
    plateau, progress = Schedule("plateau", patience=1, factor=0.5), Progress("", "")
    for loss in (1.0, 0.9, 0.95, 0.96):
        watch_plateau(plateau, progress, loss)
    assert learning_rate_of(plateau, 1.0, 0, 0, 1, progress.rate_share) == 0.5


def test_a_source_can_be_left_out_and_an_unknown_one_is_a_sentence(images: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", ("epochs = 2", "epochs = 1"))
    train(recipe, images, tmp_path / "bundle", without_sources=["site1"])
    training = load_bundle(tmp_path / "bundle").disease.manifest["training"]
    assert training["without_sources"] == ["site1"]
    assert training["images"] == {"train": 12, "val": 12}  # half of 24; validation keeps both sites
    with pytest.raises(Fatal, match="a source with 'elsewhere'"):
        train(recipe, images, tmp_path / "other", without_sources=["elsewhere"])
