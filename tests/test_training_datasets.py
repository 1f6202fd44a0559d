"""Labelled folders: layouts, manifests, splits by patient, what can't be read, what can't be trained on."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.training import calibrate, evaluate
from cxrbatch.training.datasets import (
    SPLITS,
    LabelledImage,
    data_digest,
    find_folders,
    grouped_split,
    label_matches,
    read_image,
    read_images,
    shrink,
)
from cxrbatch.training.fit import train
from cxrbatch.training.preparation import prepare
from cxrbatch.training.recipes import load_recipe
from cxrbatch.training.sampling import balanced_weights
from training_images import make_folder, write_recipe


def test_all_three_layouts_are_found(tmp_path: Path) -> None:
    split = make_folder(tmp_path / "all" / "split", counts={"train": 2, "test": 1})
    flat = tmp_path / "all" / "flat"
    (tmp_path / "all" / "split" / "train").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(flat)
    assert {f.split for f in find_folders(split)[0].images} == {"test"}
    assert Counter(f.label for f in find_folders(flat)[0].images) == {"NORMAL": 2, "SICK": 2}
    assert {f.split for f in find_folders(flat)[0].images} == {"train"}
    assert [folder.name for folder in find_folders(tmp_path / "all")] == ["flat", "split"]
    assert [folder.name for folder in find_folders(tmp_path / "all", only=("flat", "absent"))] == ["flat"]


def test_the_manifest_gives_source_and_patient(tmp_path: Path) -> None:
    image = find_folders(make_folder(tmp_path, manifest=True))[0].images[3]
    assert (image.path.name, image.source, image.group) == ("11.png", "site1", "train-NORMAL-5")


def test_a_manifest_may_name_files_as_shells_do_and_each_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ("A", "B"), {"train": 2})
    (folder / "manifest.csv").write_text("path,group\n./train/A/0.png,one\ntrain//A/1.png,two\n./train/A/0.png,one\n")
    assert {f.group for f in find_folders(folder)[0].images if f.label == "A"} == {"one", "two"}
    with (folder / "manifest.csv").open("a") as table:
        table.write("train/A/0.png,three\n")
    with pytest.raises(Fatal, match=r"train/A/0.png twice, with different sources or groups"):
        find_folders(folder)


def test_a_collections_manifest_counts_for_each_of_its_tasks(tmp_path: Path) -> None:
    make_folder(tmp_path / "task")
    (tmp_path / "manifest.csv").write_text("path,source,group\ntask/train/SICK/0.png,clinic,p1\n")
    for images in (find_folders(tmp_path / "task")[0].images, find_folders(tmp_path)[0].images):
        found = {f.path.relative_to(tmp_path).as_posix(): (f.source, f.group) for f in images}
        assert found["task/train/SICK/0.png"] == ("clinic", "p1")
        assert found["task/train/SICK/1.png"][0] == ""


def test_no_folder_and_no_images_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="does not exist"):
        find_folders(tmp_path / "nowhere")
    with pytest.raises(Fatal, match="no labelled images"):
        find_folders(tmp_path)


def test_labels_match_across_spellings() -> None:
    assert label_matches("TURBERCULOSIS", "TUBERCULOSIS")
    assert label_matches("covid-19", "COVID19")
    assert label_matches("Viral Pneumonia", "viral_pneumonia")
    assert not label_matches("CHEST", "NOT_CHEST")


def test_a_patient_is_never_parted(tmp_path: Path) -> None:
    images = [LabelledImage(Path(f"{i}.png"), "A", "train", "", f"patient{i // 3}") for i in range(90)]
    train, val = grouped_split(images, 0.2, seed=1)
    assert not {f.group for f in train} & {f.group for f in val}
    assert 18 <= len(val) <= 20 and len(train) + len(val) == 90
    assert grouped_split(images, 0.2, seed=1) == (train, val)
    assert grouped_split(images, 0.2, seed=2) != (train, val)


def test_balanced_weights_are_even_over_classes_and_damped_over_sources() -> None:
    labels = [0] * 100 + [1] * 5
    sources = ["big"] * 81 + ["small"] * 19 + ["x"] * 5
    weights = balanced_weights(labels, sources)
    assert weights.sum() == pytest.approx(1)
    assert weights[100:].sum() == pytest.approx(0.5)
    assert weights[:81].sum() / weights[81:100].sum() == pytest.approx(9 / 19**0.5)
    even = balanced_weights(labels, sources, source_power=0)
    assert even[:81].sum() == pytest.approx(even[81:100].sum())


def test_16_bit_images_are_not_washed_out_and_greys_are_unchanged(tmp_path: Path) -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "8.png"), grey)
    deep = read_image(tmp_path / "16.png")
    assert deep.std() > 40 and deep.max() > 200


def test_shrink_keeps_the_aspect_and_never_enlarges() -> None:
    grey = np.full((100, 50), 7, np.uint8)
    assert shrink(grey, 40).shape == (40, 20) and (shrink(grey, 40) == 7).all()
    assert shrink(grey, 100) is grey


def test_unreadable_files_are_listed_and_skipped(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train" / "SICK" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "train" / "SICK" / "empty.jpg").write_bytes(b"")
    Image.new("L", (9, 9)).save(root / "train" / "SICK" / "other.bmp")
    (root / "train" / "SICK" / "Thumbs.db").write_bytes(b"x")
    images = find_folders(root)[0].images
    read, arrays, lost = read_images(images, 40)
    assert len(read) == len(arrays) == len(images) - 3
    assert {image.path.name for image, _ in lost} == {"broken.png", "empty.jpg", "other.bmp"} and all(
        why for _, why in lost
    )


def test_links_that_lead_nowhere_or_to_a_folder_are_listed_and_pipes_are_not_waited_for(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", counts={"train": 2})
    sick = root / "train" / "SICK"
    before = {image.path for image in find_folders(root)[0].images}
    (sick / "moved.png").symlink_to("/nonexistent.png")
    (sick / "patient7").symlink_to(root / "train" / "NORMAL")
    (sick / "good.png").symlink_to(sick / "0.png")
    os.mkfifo(sick / "pipe.png")
    images = find_folders(root)[0].images
    assert {image.path for image in images} == before | {sick / name for name in ("moved.png", "patient7", "good.png")}
    assert {image.path.name for image, _ in read_images(images, 40)[2]} == {"moved.png", "patient7"}


def test_what_a_run_learns_from_and_is_judged_on_makes_it_another_run(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", counts={"train": 4, "val": 2}, manifest=True)
    recipe = load_recipe(write_recipe(tmp_path / "r.toml"))
    digests = [prepare(recipe, root, None).data_sha256]
    (root / "manifest.csv").write_text((root / "manifest.csv").read_text().replace("site1", "site2"))
    digests.append(prepare(recipe, root, None).data_sha256)
    (root / "train/SICK/0.png").rename(root / "val/SICK/moved.png")
    digests.append(prepare(recipe, root, None).data_sha256)
    assert len(set(digests)) == 3
    (root / "val/SICK/moved.png").rename(os.fsdecode(os.fsencode(root / "val/SICK") + b"/\xff.png"))
    assert prepare(recipe, root, None).data_sha256 == digests[2]


def test_the_digest_follows_contents_and_labels_not_order(tmp_path: Path) -> None:
    images = list(find_folders(make_folder(tmp_path))[0].images)
    assert data_digest(images) == data_digest(images[::-1])
    assert data_digest(images) != data_digest(images[1:])


@pytest.mark.parametrize(
    ("labels", "counts", "said"),
    [
        (("NORMAL",), {"train": 3, "val": 2}, "only the class NORMAL"),
        (("NORMAL", "SICK"), {"test": 3}, "for training"),
        (("TB+", "TB-", "NORMAL"), {"train": 3, "val": 2}, r"TB\+ and TB- .* same name"),
        (("NORMAL", "NOT_CHEST"), {"train": 3, "val": 2}, "'NOT_CHEST'.* Rename the folder"),
        (("A|B", "C"), {"train": 3, "val": 2}, r"'A\|B'"),
        ((b"Kr\xe4nk".decode(errors="surrogateescape"), "NORMAL"), {"train": 3, "val": 2}, r"Kr\\udce4nk"),
    ],
)
def test_what_cannot_be_trained_on_is_said(
    tmp_path: Path, labels: tuple[str, ...], counts: dict[str, int], said: str
) -> None:
    root = make_folder(tmp_path / "data", labels, counts)
    recipe = load_recipe(write_recipe(tmp_path / "r.toml"))
    with pytest.raises(Fatal, match=said):
        prepare(recipe, root, None)


def test_a_class_that_the_recipe_names_and_nobody_has_is_said(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    recipe = load_recipe(
        write_recipe(tmp_path / "r.toml", ("[[phases]]", '[classes]\nNORMAL = ["NORMAL"]\nTB = ["TB"]\n[[phases]]'))
    )
    with pytest.raises(Fatal, match=r"class TB .* folders are NORMAL, SICK"):
        prepare(recipe, root, None)


def test_a_limit_keeps_every_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("A", "B", "C"), {"train": 20, "val": 10})
    images = prepare(load_recipe(write_recipe(tmp_path / "r.toml")), root, 12)
    assert Counter(images.train_labels) == {0: 4, 1: 4, 2: 4} and len(images.val) == 12


def test_a_gate_says_one_for_what_passes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("NORMAL", "NOT_CHEST"))
    changes = (
        ('role = "disease"', 'role = "gate"'),
        ("[[phases]]", '[classes]\nCHEST = ["NORMAL"]\nNOT_CHEST = ["NOT_CHEST"]\n[[phases]]'),
    )
    images = prepare(load_recipe(write_recipe(tmp_path / "r.toml", *changes)), root, None)
    assert images.classes == ("CHEST",)
    assert [
        label for image, label in zip(images.train, images.train_labels, strict=True) if image.label == "NORMAL"
    ] == [1] * 12


def test_a_table_in_a_neighbouring_folder_does_not_make_the_tasks_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "task", ("NORMAL", "COVID19"), {"train": 1, "test": 2})
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "labels.csv").write_text("path,label\n")
    folders = find_folders(tmp_path)
    assert [folder.name for folder in folders] == ["task"]
    assert {image.split for image in folders[0].images} == {"train", "test"}


def test_tables_of_spreadsheets_are_read_and_rows_that_are_too_short_are_said(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "all" / "task", counts={"train": 2}, manifest=True)
    manifest = (data / "manifest.csv").read_text()
    (data / "manifest.csv").write_text(manifest, encoding="utf-8-sig")
    assert {f.source for f in find_folders(data)[0].images} == {"site0", "site1"}
    (data / "manifest.csv").write_text("source,path\nsite0\n")
    with pytest.raises(Fatal, match=r"Line 2 of .*manifest.csv has no 'path'"):
        find_folders(data)
    (data / "manifest.csv").write_text("path\n" + "x" * 200_000)
    with pytest.raises(Fatal, match=r"manifest.csv cannot be read \(field larger"):
        find_folders(data)
    (data / "manifest.csv").write_text("path,source\ntrain\\NORMAL\\0.png,site0\n")
    with pytest.raises(Fatal, match=r"manifest.csv names no file of .*: its paths are below"):
        find_folders(data)
    (data / "manifest.csv").unlink()
    table = tmp_path / "all" / "listed" / "labels.csv"
    table.parent.mkdir()
    table.write_text("path,finding_labels\na.png,Mass\n", encoding="utf-8-sig")
    assert [folder.name for folder in find_folders(tmp_path / "all")] == ["listed", "task"]
    table.write_text("path,finding_labels\na.png\n")
    with pytest.raises(Fatal, match=r"Line 2 of .*labels.csv has no 'finding_labels'"):
        find_folders(tmp_path / "all")


@pytest.mark.usefixtures("one_thread")
def test_a_bundle_knows_its_classes_by_the_folders_that_its_recipe_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (calibrate, evaluate):
        monkeypatch.setattr(module, "open_engine", lambda *_: TorchEngine("cpu"))
    bundle, counts = tmp_path / "bundle", dict.fromkeys(SPLITS, 4)
    images = make_folder(tmp_path / "images", ("Normal_cases", "ill", "cats"), counts, manifest=True)
    recipe, table = write_recipe(tmp_path / "r.toml", ("epochs = 2", "epochs = 1")), images / "manifest.csv"
    table.write_text(table.read_text().replace("test-ill-0", "train-ill-0"))
    small = recipe.read_text()
    recipe.write_text(small + '\n[classes]\nNORMAL = ["Normal_cases"]\nSICK = ["ill", "images/sick"]\n')
    train(recipe, images, bundle)
    assert "2 image(s) in test/ show a patient of train/" in capsys.readouterr().out
    names = '\n[classes]\nCHEST = ["Normal_cases", "ill"]\nNOT_CHEST = ["cats"]\n'
    recipe.write_text(small.replace('"disease"', '"gate"') + names)
    train(recipe, images, bundle)
    calibrate.calibrate(bundle, images)
    gate, disease = load_bundle(bundle).gate, load_bundle(bundle).disease
    assert gate is not None and gate.manifest["chosen_on"] == "val: 8 chest images and 4 others"
    assert disease.manifest["chosen_on"].startswith("val: 8 images")
    found = evaluate.evaluate(bundle, images, None, draws=5)["sets"]["images"]
    assert found["disease"]["per_class"]["NORMAL"]["support"] == 4 and set(found["called"]) == {"NOT_CHEST"}
