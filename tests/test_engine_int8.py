"""A network of whole numbers: OpenVINO runs it in 8 bits and gives the same bytes on every kind of processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.engines.networks import build_network
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.engines.openvino_graph import mobilenet_v2
from cxrbatch.inference.engines.torch_engine import TorchEngine, load_network
from cxrbatch.inference.engines.verify import check_model_inputs

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="8-bit kernels of other processors differ")

_LOGITS = """
import sys
from pathlib import Path
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.engines.verify import check_logits
for stage in load_bundle(Path(sys.argv[1])).stages:
    print(check_logits(stage, OpenVinoEngine()).tobytes().hex())
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The shipped one: in an untrained network nothing reaches the first step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_bundle("default")


def test_every_convolution_runs_in_eight_bits(bundle: Bundle) -> None:
    compiled = openvino.Core().compile_model(mobilenet_v2(bundle.disease), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [str(fact["runtimePrecision"].value) for fact in facts if fact["layerType"].value == "Convolution"]
    assert (len(kinds), set(kinds)) == (52, {"u8"})


def test_logits_are_the_same_bytes_on_processors_of_other_kinds_and_at_any_batch_and_threads(bundle: Bundle) -> None:
    of_kinds = [
        subprocess.run(
            [sys.executable, "-c", _LOGITS, str(bundle.path)],
            env=os.environ | {"ONEDNN_MAX_CPU_ISA": kind},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for kind in ("AVX2", "AVX512_CORE", "DEFAULT")
    ]
    assert of_kinds[0] and of_kinds == [of_kinds[0]] * 3
    model_inputs = check_model_inputs(144)
    together = OpenVinoEngine(threads=2).load(bundle.disease)(model_inputs)[0]
    alone = OpenVinoEngine(threads=1).load(bundle.disease)
    np.testing.assert_array_equal(together, np.concatenate([alone(each[None])[0] for each in model_inputs]))


def test_torch_computes_the_same_network_up_to_rounding(bundle: Bundle) -> None:
    model_inputs = check_model_inputs(144)
    for ours, theirs in zip(
        OpenVinoEngine().load(bundle.disease)(model_inputs),
        TorchEngine("cpu").load(bundle.disease)(model_inputs),
        strict=True,
    ):
        assert np.square(ours - theirs).mean() < 0.06**2 * np.square(theirs).mean()


def test_weights_and_activations_are_on_their_grids_and_learn(bundle: Bundle) -> None:
    net = load_network(bundle.disease)
    seen: list[torch.Tensor] = []
    for block in net.features:  # type: ignore[attr-defined]
        for part in [*block.conv[:-2], block] if hasattr(block, "conv") else [block]:
            part.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    net(torch.from_numpy(check_model_inputs(64)[:, None].astype(np.float32)) / 127.5 - 1)
    expansion, before_projection, block_output = 6 / 255, 6 / 127, 3 / 16
    blocks = [before_projection, block_output] + [expansion, before_projection, block_output] * 16
    for output, step in zip(seen, [6 / 255, *blocks, 6 / 255], strict=True):
        steps = output / step
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    trained = build_network("mobilenet_v2_int8", 1, 2).train()
    trained(torch.rand(4, 1, 64, 64))[0].square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained.parameters())
