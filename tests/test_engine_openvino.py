"""OpenVINO gives torch's numbers, keeps what it converted, and makes way for torch where it does not agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxrbatch import engines
from cxrbatch.bundles import Bundle, load_bundle
from cxrbatch.engines import open_engine
from cxrbatch.engines.openvino_engine import OpenVinoEngine
from cxrbatch.engines.torch_engine import TorchEngine
from cxrbatch.engines.verify import check_logits, check_planes
from cxrbatch.errors import ExitCode, Fatal
from making import make_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_bundle(make_bundle(tmp_path / "b"))


def test_it_gives_what_torch_gives_for_any_batch_and_keeps_the_conversion(bundle: Bundle, tmp_path: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    network, reference = OpenVinoEngine().load(bundle.disease), TorchEngine("cpu").load(bundle.disease)
    for n in (5, 1, 3):
        for ours, theirs in zip(network(planes[:n]), reference(planes[:n]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    first = network(planes[:1])[0]
    network(planes[1:2])
    np.testing.assert_array_equal(first, network(planes[:1])[0], "results are copies, not the engine's own memory")
    (kept,) = (tmp_path / "cache/cxrbatch").glob("*.xml")
    before = kept.stat().st_mtime_ns
    OpenVinoEngine().load(bundle.disease)
    assert kept.stat().st_mtime_ns == before


def test_trained_networks_give_what_torch_gives(bundle: Bundle) -> None:
    for stage in load_bundle("default").stages:  # their batch norms do something
        planes = check_planes(stage.plane.size)
        for ours, theirs in zip(
            OpenVinoEngine().load(stage)(planes), TorchEngine("cpu").load(stage)(planes), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_an_architecture_without_a_graph_of_ours_is_converted(bundle: Bundle, tmp_path: Path) -> None:
    stage = load_bundle(make_bundle(tmp_path / "v3", with_gate=False, architecture="mobilenet_v3_large")).disease
    planes = check_planes(64)
    ours, theirs = (engine.load(stage)(planes)[0] for engine in (OpenVinoEngine(), TorchEngine("cpu")))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_what_is_kept_depends_on_everything_it_was_made_from(bundle: Bundle, tmp_path: Path) -> None:
    OpenVinoEngine().load(bundle.disease)
    larger = load_bundle(make_bundle(tmp_path / "larger", size=96))  # the very same weights
    assert larger.disease.sha256 == bundle.disease.sha256
    planes = np.zeros((1, 96, 96), np.uint8)
    assert OpenVinoEngine().load(larger.disease)(planes)[0].shape == (1, 4)


def test_a_start_needs_no_torch_and_no_converter(bundle: Bundle) -> None:
    program = (
        "import sys; from cxrbatch.bundles import load_bundle; from cxrbatch.engines import open_engine\n"
        f"engine = open_engine('auto', 'cpu', load_bundle({str(bundle.path)!r}))\n"
        "print(engine.name, *(name in sys.modules for name in ('torch', 'openvino.tools.ovc')))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["openvino", "False", "False"]


def test_a_stage_is_compiled_once(bundle: Bundle) -> None:
    engine = OpenVinoEngine()
    assert engine.load(bundle.disease) is engine.load(bundle.disease)


def test_a_damaged_conversion_is_made_again(bundle: Bundle, tmp_path: Path) -> None:
    expected = check_logits(bundle.disease, OpenVinoEngine())
    (kept,) = (tmp_path / "cache/cxrbatch").glob("*.xml")
    kept.write_bytes(kept.read_bytes()[:1000])
    np.testing.assert_allclose(check_logits(bundle.disease, OpenVinoEngine()), expected, atol=1e-5)


def test_auto_takes_torch_where_openvino_disagrees_with_the_bundle(bundle: Bundle) -> None:
    assert open_engine("auto", "cpu", bundle).name == "openvino"
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest["stages"][1]["check_logits"] = [[9.0] * 4] * 4
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    assert open_engine("auto", "cpu", load_bundle(bundle.path)).name == "torch"


def test_auto_takes_openvino_where_the_installed_torch_knows_no_gpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_gpus", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_engine("auto", "auto", bundle).name == "openvino"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    engine = open_engine("auto", "auto", bundle)
    assert (engine.name, engine.device) == ("torch", "cuda:0")
    assert open_engine("auto", "cpu", bundle).name == "openvino"


def test_it_is_told_to_count_in_float32(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with bfloat16 it would take that unasked, and probabilities would differ between machines."""
    engine = OpenVinoEngine()
    core, told = engine._core, []

    class Core:
        read_model = core.read_model

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            told.append(settings["INFERENCE_PRECISION_HINT"])
            return core.compile_model(model, device, settings)

    monkeypatch.setattr(engine, "_core", Core())
    engine.load(bundle.disease)
    assert told == ["f32"]


def test_openvino_on_a_gpu_is_one_sentence() -> None:
    with pytest.raises(Fatal, match="--engine torch") as caught:
        open_engine("openvino", "cuda:0")
    assert caught.value.exit_code is ExitCode.DEVICE_MISSING
