"""OpenVINO gives the same numbers as torch, caches compiled networks, and is not used where it disagrees."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference import engines
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.engines import open_engine, openvino_engine
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.inference.engines.verify import check_logits, check_model_inputs
from factories import make_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_bundle(make_bundle(tmp_path / "b"))


def test_it_gives_what_torch_gives_for_any_batch_and_caches_what_it_compiled(bundle: Bundle, tmp_path: Path) -> None:
    model_inputs = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    network, reference = OpenVinoEngine().load(bundle.disease), TorchEngine("cpu").load(bundle.disease)
    for n in (5, 1, 3):
        for ours, theirs in zip(network(model_inputs[:n]), reference(model_inputs[:n]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    first = network(model_inputs[:1])[0]
    network(model_inputs[1:2])
    np.testing.assert_array_equal(
        first, network(model_inputs[:1])[0], "results are copies, not the engine's own memory"
    )
    (cached,) = (tmp_path / "cache/cxrbatch").iterdir()
    before = cached.stat().st_mtime_ns
    np.testing.assert_array_equal(first, OpenVinoEngine().load(bundle.disease)(model_inputs[:1])[0])
    assert cached.stat().st_mtime_ns == before


@pytest.mark.parametrize("why", ["full", "homeless"])
def test_a_conversion_that_cannot_be_kept_is_used(bundle: Bundle, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "homeless":
        for variable in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(variable)
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # EFBIG, as ENOSPC of a full disk
    try:
        OpenVinoEngine().load(bundle.disease)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_trained_networks_give_what_torch_gives(bundle: Bundle) -> None:
    for stage in load_bundle("alveoli").stages:  # their batch norms do something
        model_inputs = check_model_inputs(stage.model_input.size)
        for ours, theirs in zip(
            OpenVinoEngine().load(stage)(model_inputs), TorchEngine("cpu").load(stage)(model_inputs), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_an_architecture_without_a_graph_of_ours_is_converted(bundle: Bundle, tmp_path: Path) -> None:
    stage = load_bundle(make_bundle(tmp_path / "v3", with_gate=False, architecture="mobilenet_v3_large")).disease
    model_inputs = check_model_inputs(64)
    ours, theirs = (engine.load(stage)(model_inputs)[0] for engine in (OpenVinoEngine(), TorchEngine("cpu")))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_what_is_cached_depends_on_everything_it_was_made_from(bundle: Bundle, tmp_path: Path) -> None:
    OpenVinoEngine().load(bundle.disease)
    larger = load_bundle(make_bundle(tmp_path / "larger", size=96))  # the very same weights
    assert larger.disease.sha256 == bundle.disease.sha256
    model_inputs = np.zeros((1, 96, 96), np.uint8)
    assert OpenVinoEngine().load(larger.disease)(model_inputs)[0].shape == (1, 4)


def test_a_processor_of_another_kind_has_a_cache_of_its_own(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OpenVinoEngine().load(bundle.disease)
    monkeypatch.setattr(openvino_engine, "_processor_features", lambda: "flags: another kind")
    OpenVinoEngine().load(bundle.disease)
    assert len(list((tmp_path / "cache/cxrbatch").iterdir())) == 2


def test_a_start_needs_no_torch_and_no_converter(bundle: Bundle) -> None:
    program = (
        "import sys; from cxrbatch.inference.bundle import load_bundle\n"
        "from cxrbatch.inference.engines import open_engine\n"
        f"engine = open_engine('auto', 'cpu', load_bundle({str(bundle.path)!r}))\n"
        "print(engine.name, *(name in sys.modules for name in ('torch', 'openvino.tools.ovc')))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["openvino", "False", "False"]


def test_a_stage_is_compiled_once(bundle: Bundle) -> None:
    engine = OpenVinoEngine()
    assert engine.load(bundle.disease) is engine.load(bundle.disease)


@pytest.mark.parametrize("damage", ["cut", "one bit", "another version"])
def test_a_damaged_cache_is_compiled_again(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    expected = check_logits(bundle.disease, OpenVinoEngine())
    (cached,) = (tmp_path / "cache/cxrbatch").iterdir()
    whole = cached.read_bytes()
    match damage:
        case "cut":
            cached.write_bytes(whole[:-1000])
        case "one bit":  # of a weight: OpenVINO would take it
            at = len(whole) // 2
            cached.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        case "another version":
            other = whole[32:].replace(openvino.__version__.split("-")[0].encode(), b"1999.1.0")
            assert other != whole[32:]
            cached.write_bytes(hashlib.sha256(other).digest() + other)
    damaged = cached.read_bytes()
    np.testing.assert_array_equal(check_logits(bundle.disease, OpenVinoEngine()), expected)
    assert cached.read_bytes() != damaged


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
    """By default it uses bfloat16 on processors that have it, and probabilities would differ between machines."""
    asked = []

    class Core:
        def __init__(self) -> None:
            self._core = openvino.Core()

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            asked.append(("compile", settings["INFERENCE_PRECISION_HINT"]))
            return self._core.compile_model(model, device, settings)

        def import_model(self, stream: Any, device: str, settings: dict[str, Any]) -> Any:
            asked.append(("import", settings["INFERENCE_PRECISION_HINT"]))
            return self._core.import_model(stream, device, settings)

    for _ in range(2):
        engine = OpenVinoEngine()
        monkeypatch.setattr(engine, "_core", Core())
        engine.load(bundle.disease)
    assert asked == [("compile", "f32"), ("import", "f32")]


def test_openvino_on_a_gpu_is_one_sentence() -> None:
    with pytest.raises(Fatal, match="--engine torch") as caught:
        open_engine("openvino", "cuda:0")
    assert caught.value.exit_code is ExitCode.DEVICE_MISSING
