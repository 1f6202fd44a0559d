"""Recipes with one output more than classes, labels in a table, images left out, and sources weighed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.cascade import other_probability
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.networks import build_network, load_state
from cxrbatch.training.backbones import split_other
from cxrbatch.training.calibrate import calibrate
from cxrbatch.training.datasets import find_folders
from cxrbatch.training.fit import train
from cxrbatch.training.preparation import prepare
from cxrbatch.training.recipes import load_recipe
from training_images import make_folder, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = (
    ("batch = 8", 'batch = 8\nsampling = "balanced"\nother = "OTHER"\ndata = ["a", "table"]'),
    (
        "[[phases]]",
        """[classes]
NORMAL = ["NORMAL", "table/No Finding"]
SICK = ["SICK"]
[[partial]]
labels = ["OTHER", "table/Mass"]
classes = ["OTHER"]
share = 0.2
[[partial]]
labels = ["table/Effusion"]
classes = ["NORMAL", "OTHER"]
share = 0.1
[[phases]]""",
    ),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "data" / "a", ("NORMAL", "SICK", "OTHER"), {"train": 4, "val": 3}).parent
    make_folder(folder / "table" / "images", ("x",), {"train": 3})
    files = sorted(p.relative_to(folder / "table") for p in (folder / "table").rglob("*") if p.is_file())
    labels = ("No Finding", "Effusion|Mass", "Mass")
    lines = [f"{file},{label},p{n}" for n, (file, label) in enumerate(zip(files, labels, strict=True))]
    (folder / "table" / "labels.csv").write_text("path,finding_labels,group\n" + "\n".join(lines) + "\n")
    return folder


def test_a_table_of_labels_is_read_and_a_later_label_wins(data: Path, tmp_path: Path) -> None:
    images = prepare(load_recipe(write_recipe(tmp_path / "r.toml", *RECIPE)), data, None)
    found = {(f.label, f.group): c for f, c in zip(images.train, images.train_labels, strict=True) if f.task == "table"}
    assert found == {("No Finding", "p0"): 0, ("Effusion|Mass", "p1"): 3, ("Mass", "p2"): 2}
    assert images.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]]


def test_a_missing_image_is_listed_and_a_table_of_something_else_is_left_alone(data: Path, tmp_path: Path) -> None:
    table = data / "table" / "labels.csv"
    table.write_text(table.read_text() + "images/none.png,Mass,p9\n")
    images = prepare(load_recipe(write_recipe(tmp_path / "r.toml", *RECIPE)), data, None)
    assert [f.path.name for f, _ in images.unreadable] == ["none.png"]
    table.write_text("path,label\n")
    assert "No Finding" not in {f.label for folder in find_folders(data) for f in folder.images}


def test_files_that_a_list_names_are_left_out(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.toml", *RECIPE))
    everything = prepare(recipe, data, None).train
    out = tmp_path / "out.csv"
    out.write_text("path,why\n" + f"{everything[0].path.relative_to(data)},wrong\n")
    assert prepare(recipe, data, None, without_files=out).train == everything[1:]
    out.write_text("path\nnothing/of/this.png\n")
    with pytest.raises(Fatal, match="names no training image"):
        prepare(recipe, data, None, without_files=out)
    out.write_text("file\n")
    with pytest.raises(Fatal, match="has no column 'path'"):
        prepare(recipe, data, None, without_files=out)
    with pytest.raises(Fatal, match="cannot be read"):
        prepare(recipe, data, None, without_files=tmp_path / "none.csv")


def test_the_other_output_goes_into_the_bundle_beside_the_classes(data: Path, tmp_path: Path) -> None:
    """The probability from the stored row and the features is the one that the whole network would give."""
    train(write_recipe(tmp_path / "r.toml", *RECIPE), data, tmp_path / "bundle", epochs=1)
    stage = load_bundle(tmp_path / "bundle").disease
    assert stage.classes == ("NORMAL", "SICK") and stage.other is not None
    x = np.random.default_rng(0).integers(0, 256, (3, stage.model_input.size, stage.model_input.size), np.uint8)
    logits, features = open_engine("torch", "cpu", load_bundle(tmp_path / "bundle")).load(stage)(x)
    whole = torch.softmax(torch.from_numpy(np.c_[logits, features @ stage.other.weight + stage.other.bias]), 1).numpy()
    assert logits.shape == (3, 2)
    assert other_probability(logits, features, stage) == pytest.approx(whole[:, -1], abs=1e-6)


def test_the_last_layer_is_parted_and_nothing_else_changes() -> None:
    net = build_network("mobilenet_v2", 1, 5).eval()
    kept, (weight, bias) = split_other(net.state_dict(), 4)
    smaller = build_network("mobilenet_v2", 1, 4)
    load_state(smaller, kept)
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        (five, features), (four, _) = net(x), smaller.eval()(x)
    assert torch.equal(five[:, :4], four)
    assert torch.allclose(five[:, 4], features @ weight + bias, atol=1e-5)


def test_calibrate_keeps_the_other_output(data: Path, tmp_path: Path) -> None:
    train(write_recipe(tmp_path / "r.toml", *RECIPE), data, tmp_path / "bundle", epochs=1)
    before = load_bundle(tmp_path / "bundle").disease.other
    calibrate(tmp_path / "bundle", data)
    stage = load_bundle(tmp_path / "bundle").disease
    assert before is not None and stage.other is not None and np.array_equal(before.weight, stage.other.weight)


def test_what_balance_adds_is_in_the_logits_and_in_the_manifest(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which constants are found is tested in test_training_metrics.py."""
    monkeypatch.setattr("cxrbatch.training.calibrate.balanced_bias", lambda *_: np.array([-0.5, 0.5]))
    train(write_recipe(tmp_path / "r.toml", *RECIPE), data, tmp_path / "bundle", epochs=1)
    before = load_bundle(tmp_path / "bundle").disease.manifest["check_logits"]
    for _ in range(2):  # a second time adds to the first
        calibrate(tmp_path / "bundle", data, balance=True)
    stage = load_bundle(tmp_path / "bundle").disease.manifest
    assert stage["class_bias"] == {"NORMAL": -1.0, "SICK": 1.0}
    assert np.subtract(stage["check_logits"], before) == pytest.approx(np.tile([-1.0, 1.0], (len(before), 1)), abs=2e-4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (('other = "OTHER"', 'other = "NOBODY"'), "names OTHER, which is none of its"),
        (('classes = ["OTHER"]', 'classes = ["SICK"]'), None),
        (('classes = ["NORMAL", "OTHER"]', 'classes = ["NORMAL"]'), None),
        (("NORMAL = [", 'OTHER = ["x"]\nNORMAL = ['), "has the name of a class, OTHER"),
        (("[[phases]]", "[source_weights]\nx = 0\n[[phases]]"), "source_weights.x is 0.0 and must be from"),
    ],
)
def test_contradictions_are_said(tmp_path: Path, change: tuple[str, str], why: str | None) -> None:
    file = write_recipe(tmp_path / "r.toml", *RECIPE)
    file.write_text(file.read_text().replace(*change, 1))
    if why is None:
        load_recipe(file)  # another label still teaches the output
        return
    with pytest.raises(Fatal, match=why):
        load_recipe(file)


def test_an_output_that_nothing_teaches_is_refused(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "r.toml", *RECIPE)
    file.write_text(
        file.read_text().replace('["OTHER"]\nshare', '["SICK"]\nshare').replace('"NORMAL", "OTHER"]', '"NORMAL"]')
    )
    with pytest.raises(Fatal, match="teaches its other output, OTHER"):
        load_recipe(file)
