"""A bundle that is not what its manifest says is refused in one sentence, before a weight is used."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrbatch.bundles import ARCHITECTURES, SHIPPED, load_bundle
from cxrbatch.engines import networks, open_engine
from cxrbatch.engines.verify import check_logits, check_planes, largest_difference
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.normalize import fit_plane
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.training.bundle_writer import change_stage
from making import make_bundle


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
    (tmp_path / "disease.safetensors").symlink_to(SHIPPED / "covid3" / "disease.safetensors")
    rng = np.random.default_rng(0)
    refusals = 0
    for place in rng.choice(len(raw), 200, replace=False):
        data = bytearray(raw)
        data[place] ^= 1 << int(rng.integers(0, 7))
        (tmp_path / "manifest.json").write_bytes(data)
        try:
            told = load_bundle(tmp_path).manifest
        except Fatal as said:
            assert said.exit_code is ExitCode.BUNDLE_UNUSABLE
            refusals += 1
        else:
            assert told == json.loads(raw)  # a space became another
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
        ({"plane": {"size": 64, "fit": "pqd"}}, "no such plane"),
        ({"plane": {"size": 64, "interpolation": "bilinearly"}}, "no such plane"),
        ({"plane": {"size": "64"}}, "no such plane"),
        ({"plane": {"size": 0}}, "no such plane"),
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


def test_check_planes_are_the_same_everywhere() -> None:
    import hashlib

    planes = check_planes(64)
    assert planes.dtype == np.uint8 and planes.shape == (4, 64, 64)
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in planes}) == 4


def test_a_name_that_the_file_system_refuses() -> None:
    refused(Path("x" * 300), "cannot be read")


def test_the_shipped_gate_wants_anatomy_and_not_greys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gate = next(stage for stage in load_bundle("default").stages if stage.role == "gate")
    film = np.rint(draw_chest(Chest(rows=240, columns=200)) * 255).astype(np.uint8)
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 6), dtype=np.uint8)
    blobs = [np.asarray(Image.fromarray(one).resize((160, 160))) for one in coarse]
    quarters_exchanged = np.roll(film, (120, 100), (0, 1))
    planes = [fit_plane(picture, gate.plane) for picture in (film, quarters_exchanged, *blobs)]
    logits, _ = open_engine("openvino", "cpu").load(gate)(np.stack(planes))
    assert list(logits[:, 0] > 0) == [True] + [False] * 5
