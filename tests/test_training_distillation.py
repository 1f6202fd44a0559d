"""A student starts as its teacher and learns the teacher's answers, whatever the labels say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.training.fit import train
from cxrbatch.training.recipes import load_recipe
from factories import make_bundle
from training_images import make_folder, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = (
    (
        "batch = 8",
        'batch = 8\nsampling = "balanced"\nother = "OTHER"\n'
        'partial = [{ labels = ["STRANGE"], classes = ["OTHER"], share = 0.2 }]',
    ),
    ("[[phases]]", '[classes]\nNORMAL = ["NORMAL"]\nSICK = ["SICK"]\n[[phases]]'),
)


def taught_by(teacher: Path) -> tuple[tuple[str, str], ...]:
    return ("channels = 1", f'channels = 1\npretrained = "bundle:{teacher}"\ndistillation = true'), ("1e-3", "1e-4")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), ("NORMAL", "SICK", "STRANGE"))


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train(write_recipe(folder / "t.toml", *OTHER), images, folder / "bundle")
    return folder / "bundle"


def tensors(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(load_bundle(bundle).disease.weights)


def last_loss(bundle: Path) -> float:
    lines = (bundle / "training" / "disease-metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["train_loss"])


def test_a_student_of_the_same_kind_has_nothing_to_learn_even_from_wrong_labels(
    images: Path, teacher: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(images, wrong)
    train_folder = wrong / "train"
    (train_folder / "NORMAL").rename(train_folder / "WAS_NORMAL")
    (train_folder / "SICK").rename(train_folder / "NORMAL")
    (train_folder / "WAS_NORMAL").rename(train_folder / "SICK")
    train(write_recipe(tmp_path / "s.toml", *OTHER, *taught_by(teacher)), wrong, tmp_path / "student")
    assert last_loss(tmp_path / "student") < 1e-4
    before, after = tensors(teacher), tensors(tmp_path / "student")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-2, rtol=1e-2)
    assert torch.equal(after["network.features.0.1.running_mean"], before["network.features.0.1.running_mean"]), (
        "batch-norm statistics are still"
    )


def test_a_student_in_whole_numbers_comes_close(images: Path, teacher: Path, tmp_path: Path) -> None:
    whole = (('"mobilenet_v2"', '"mobilenet_v2_int8"'), ("channels = 1", 'channels = 1\nnormalise = "int8"'))
    train(write_recipe(tmp_path / "s.toml", *OTHER, *taught_by(teacher), *whole), images, tmp_path / "student")
    assert load_bundle(tmp_path / "student").disease.int8
    assert 1e-9 < last_loss(tmp_path / "student") < 0.02


def test_a_gate_teaches_a_gate(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", ("CHEST", "NOT_CHEST"))
    gate = (
        ('role = "disease"', 'role = "gate"'),
        ("[[phases]]", '[classes]\nCHEST = ["CHEST"]\nNOT_CHEST = ["NOT_CHEST"]\n[[phases]]'),
    )
    teacher = make_bundle(tmp_path / "teacher")
    shutil.copytree(teacher, tmp_path / "student")
    train(write_recipe(tmp_path / "s.toml", *gate, *taught_by(teacher)), images, tmp_path / "student")
    stage = load_bundle(tmp_path / "student").gate
    assert stage is not None and stage.manifest["training"]["recipe"] == "small"
    assert load_file(stage.weights)["network.classifier.1.bias"].item() == pytest.approx(10, abs=0.05)


def test_a_run_is_not_gone_on_with_by_another_teacher_of_the_same_name(
    images: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    student = write_recipe(tmp_path / "s.toml", *OTHER, *taught_by(mine))
    train(student, images, tmp_path / "student", epochs=1)
    train(student, images, tmp_path / "student", epochs=1)
    assert "starts anew" not in capsys.readouterr().out
    train(write_recipe(tmp_path / "t.toml", *OTHER, ("seed = 3", "seed = 4")), images, mine, epochs=1)
    capsys.readouterr()
    train(student, images, tmp_path / "student", epochs=1)
    assert "starts anew" in capsys.readouterr().out


def test_what_cannot_teach_is_refused_in_a_sentence(images: Path, teacher: Path, tmp_path: Path) -> None:
    without_other = write_recipe(tmp_path / "s.toml", OTHER[1], *taught_by(teacher))
    with pytest.raises(Fatal, match="has other classes, outputs or channels than the recipe"):
        train(without_other, images, tmp_path / "student")
    for changes, why in (
        (("channels = 1", "channels = 1\ndistillation = true"), 'pretrained = "bundle:NAME"'),
        (("batch = 8", f'batch = 8\ndistillation = true\npretrained = "bundle:{teacher}"\nmixup = 0.2'), "no mixup"),
    ):
        with pytest.raises(Fatal, match=why):
            load_recipe(write_recipe(tmp_path / "r.toml", changes))
