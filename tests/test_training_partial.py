"""Recipes whose labels say less than a class, gates with a third answer, and the device of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.training import optimisation
from cxrbatch.training.fit import train
from cxrbatch.training.optimisation import training_device
from cxrbatch.training.preparation import Prepared, prepare
from cxrbatch.training.recipes import load_recipe
from cxrbatch.training.sampling import balanced_weights
from training_images import make_folder, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = (
    ("batch = 8", 'batch = 8\nsampling = "balanced"\nlabel_smoothing = 0.05\ndata = ["a", "b"]'),
    (
        "[[phases]]",
        """[classes]
NORMAL = ["NORMAL"]
SICK = ["SICK", "b/OPACITY"]
WORSE = ["WORSE"]
[[partial]]
labels = ["a/OPACITY"]
classes = ["SICK", "WORSE"]
share = 0.25
[[partial]]
labels = ["OTHER"]
classes = []
smoothing = 1
share = 0.15
[[phases]]""",
    ),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_folder(tmp_path / "data" / "a", ("NORMAL", "SICK", "WORSE", "OPACITY"), {"train": 4, "val": 3})
    make_folder(tmp_path / "data" / "b", ("NORMAL", "OPACITY", "OTHER"), {"train": 4, "val": 2})
    return tmp_path / "data"


@pytest.fixture
def images(data: Path, tmp_path: Path) -> Prepared:
    return prepare(load_recipe(write_recipe(tmp_path / "r.toml", *RECIPE)), data, None)


def test_a_label_means_what_its_task_says(images: Prepared) -> None:
    numbers = {(f.task, f.label): c for f, c in zip(images.train, images.train_labels, strict=True)}
    assert numbers == {
        ("a", "NORMAL"): 0, ("b", "NORMAL"): 0, ("a", "SICK"): 1, ("b", "OPACITY"): 1, ("a", "WORSE"): 2,
        ("a", "OPACITY"): 3, ("b", "OTHER"): 4,
    }  # fmt: skip
    assert images.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]
    assert images.smoothing.tolist() == pytest.approx([0.05, 0.05, 0.05, 0.1, 1.0])


def test_partial_labels_are_never_validated_on(images: Prepared) -> None:
    assert {(f.task, f.label) for f in images.val} == {
        ("a", "NORMAL"), ("b", "NORMAL"), ("a", "SICK"), ("b", "OPACITY"), ("a", "WORSE"),
    }  # fmt: skip


def test_partial_labels_are_drawn_by_their_share(images: Prepared) -> None:
    weights = balanced_weights(images.train_labels, [f.source for f in images.train], 0.5, images.shares)
    labels = np.asarray(images.train_labels)
    assert [weights[labels == c].sum() for c in range(5)] == pytest.approx([0.2, 0.2, 0.2, 0.25, 0.15])


def test_a_run_with_partial_labels_makes_a_bundle_of_its_classes(data: Path, tmp_path: Path) -> None:
    train(write_recipe(tmp_path / "r.toml", *RECIPE), data, tmp_path / "bundle", epochs=1)
    stage = load_bundle(tmp_path / "bundle").disease
    assert stage.classes == ("NORMAL", "SICK", "WORSE")
    assert stage.manifest["training"]["data"] == ["a", "b"]


def test_a_gate_is_asked_for_a_third_answer(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", ("NORMAL", "NOT_CHEST", "LATERAL"), {"train": 4, "val": 3})
    recipe = write_recipe(
        tmp_path / "gate.toml",
        ('role = "disease"', 'role = "gate"'),
        ("[[phases]]", '[classes]\nCHEST = ["NORMAL"]\nNOT_CHEST = ["NOT_CHEST"]\nLATERAL = ["LATERAL"]\n[[phases]]'),
    )
    images = prepare(load_recipe(recipe), data, None)
    asked = {f.label: images.targets[c].tolist() for f, c in zip(images.train, images.train_labels, strict=True)}
    assert asked == {"NORMAL": [1, 1], "NOT_CHEST": [0, 0], "LATERAL": [1, 0]}
    train(recipe, data, tmp_path / "bundle", epochs=1)
    train(write_recipe(tmp_path / "r.toml", ("[[phases]]", CLASSES)), data, tmp_path / "bundle", epochs=1)
    gate = load_bundle(tmp_path / "bundle").gate
    assert gate is not None and gate.classes == ("CHEST", "FRONTAL") and gate.frontal_threshold == 0.5


def test_without_lateral_images_the_gate_has_one_answer(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", ("NORMAL", "NOT_CHEST"), {"train": 3, "val": 2})
    assert prepare(load_recipe("best-gate"), data, None).classes == ("CHEST",)


CLASSES = '[classes]\nNORMAL = ["NORMAL"]\nOTHER = ["NOT_CHEST", "LATERAL"]\n[[phases]]'


def test_the_device_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation.torch.cuda, "is_available", lambda: True)
    assert training_device("auto") == torch.device("cuda") == training_device("cuda")
    assert training_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(optimisation.torch.cuda, "is_available", lambda: False)
    assert training_device("auto") == torch.device("cpu")
    with pytest.raises(Fatal, match="no CUDA GPU"):
        training_device("cuda")
    with pytest.raises(Fatal, match="none of"):
        training_device("tpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_a_gpu_ends_in_a_bundle(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", *RECIPE, ("batch = 8", "batch = 8\nmixup = 0.2\nmixstyle = 0.5"))
    train(recipe, data, tmp_path / "bundle", device="cuda")
    assert load_bundle(tmp_path / "bundle").disease.manifest["training"]["device"] == "cuda"
