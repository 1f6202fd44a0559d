"""First weights from findings, of which an image may have any number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.training.fit import train
from cxrbatch.training.preparation import prepare
from cxrbatch.training.recipes import load_recipe
from training_images import make_folder, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

FINDINGS = (
    ('role = "disease"', 'role = "findings"'),
    ("[[phases]]", '[classes]\nMASS = ["Mass"]\nFLUID = ["Effusion", "Edema"]\n[[phases]]'),
)
LABELS = ("No Finding", "Effusion|Mass", "Mass", "Edema")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "table"
    make_folder(folder / "images", ("x",), {"train": 24})
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    lines = [f"{file},{LABELS[n % 4]},p{n // 2}" for n, file in enumerate(files)]
    (folder / "labels.csv").write_text("path,finding_labels,group\n" + "\n".join(lines) + "\n")
    return tmp_path / "data"


def test_an_image_may_have_several_findings_or_none(data: Path, tmp_path: Path) -> None:
    images = prepare(load_recipe(write_recipe(tmp_path / "r.toml", *FINDINGS)), data, None)
    asked = {f.label: images.targets[c].tolist() for f, c in zip(images.train, images.train_labels, strict=True)}
    assert asked == {"No Finding": [0, 0], "Effusion|Mass": [1, 1], "Mass": [1, 0], "Edema": [0, 1]}
    assert not {f.group for f in images.train} & {f.group for f in images.val}  # a patient is on one side only


def test_a_finding_that_no_image_has_is_refused(data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", *FINDINGS, ('["Mass"]', '["Hernia"]'))
    with pytest.raises(Fatal, match="MASS"):
        prepare(load_recipe(recipe), data, None)


def test_findings_need_classes_and_a_shuffle(tmp_path: Path) -> None:
    for changes in (FINDINGS[:1], (*FINDINGS, ("batch = 8", 'batch = 8\nsampling = "balanced"'))):
        with pytest.raises(Fatal, match="findings needs"):
            load_recipe(write_recipe(tmp_path / "r.toml", *changes))


def test_weights_from_findings_start_a_disease_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(write_recipe(tmp_path / "f.toml", *FINDINGS), data, tmp_path / "first")
    weights = tmp_path / "first" / "findings.safetensors"
    assert str(weights) in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "first" / "manifest.json").exists()
    first = load_file(weights)
    make_folder(tmp_path / "classes")
    still = write_recipe(tmp_path / "d.toml", ("frozen = 0", "frozen = -1"))
    train(still, tmp_path / "classes", tmp_path / "bundle", epochs=1, pretrained=str(weights))
    kept = load_file(load_bundle(tmp_path / "bundle").disease.weights)
    name = next(key for key in first if key.startswith("features.") and key.endswith("weight"))
    np.testing.assert_allclose(kept[f"network.{name}"].float(), first[name], rtol=2e-3, atol=1e-4)  # float16 on disk


def test_other_first_weights_are_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, recipe = make_folder(tmp_path / "classes"), write_recipe(tmp_path / "r.toml")
    train(recipe, data, tmp_path / "bundle", epochs=1)
    train(recipe, data, tmp_path / "bundle", epochs=1)
    assert "starts anew" not in capsys.readouterr().out
    train(recipe, data, tmp_path / "bundle", epochs=1, pretrained="bundle:default")
    assert "starts anew" in capsys.readouterr().out
