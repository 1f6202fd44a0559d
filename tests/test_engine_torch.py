"""The torch engine: folding changes nothing, memory errors halve the batch, replicas keep the order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines import torch_engine
from cxrbatch.inference.engines.networks import build_network, load_state
from cxrbatch.inference.engines.torch_engine import (
    TorchEngine,
    ending_when_lost,
    fastest_batch,
    halving_on_oom,
    over_replicas,
    over_streams,
    torch_devices,
)
from factories import make_bundle

Result = tuple[NDArray[np.float32], NDArray[np.float32]]


def model_inputs(n: int, size: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)


def test_the_engine_gives_what_the_plain_network_gives(tmp_path: Path) -> None:
    stage = load_bundle(make_bundle(tmp_path / "b")).disease
    net = build_network("mobilenet_v2", 1, 4)
    load_state(net, {k.removeprefix("network."): v for k, v in load_file(stage.weights).items()})
    x = model_inputs(3)
    with torch.inference_mode():
        expected = net.eval()((torch.from_numpy(x)[:, None].float() / 255 - 0.5) / 0.5)
    logits, features = TorchEngine("cpu").load(stage)(x)
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(features, expected[1].numpy(), atol=1e-4)


def test_a_colour_checkpoint_in_a_grey_network_sees_the_same() -> None:
    torch.manual_seed(0)
    colour, grey = build_network("mobilenet_v2", 3, 2).eval(), build_network("mobilenet_v2", 1, 2).eval()
    load_state(grey, colour.state_dict())
    x = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(grey(x)[0], colour(x.expand(-1, 3, -1, -1))[0], atol=1e-5, rtol=1e-4)


def numbered(x: NDArray[np.uint8]) -> Result:
    return x[:, 0, :1].astype(np.float32), x[:, 0, :2].astype(np.float32)


def test_out_of_memory_halves_the_batch_and_remembers() -> None:
    tried: list[int] = []

    def device_with_room_for_three(x: NDArray[np.uint8]) -> Result:
        tried.append(len(x))
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return numbered(x)

    run = halving_on_oom(device_with_room_for_three)
    x = model_inputs(16)
    np.testing.assert_array_equal(run(x)[0], numbered(x)[0])
    assert tried[:4] == [16, 8, 4, 2]
    tried.clear()
    run(x)
    assert set(tried) == {2}


def test_out_of_memory_for_a_single_image_is_not_hidden() -> None:
    def full(x: NDArray[np.uint8]) -> Result:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        halving_on_oom(full)(model_inputs(4))


@pytest.mark.parametrize("answers", [True, False])
def test_a_gpu_that_answers_nothing_any_more_ends_the_process(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """No GPU here: after an assertion fails on a device, each later call fails in just this way."""

    def synchronize(device: str) -> None:
        if not answers:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def fails(x: NDArray[np.uint8]) -> Result:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    with pytest.raises(RuntimeError if answers else Fatal) as raised:
        halving_on_oom(ending_when_lost(fails, "cuda:0"))(model_inputs(4))
    if isinstance(raised.value, Fatal):
        assert raised.value.exit_code == ExitCode.FATAL, "systemd starts it again"
        assert str(raised.value).startswith("The GPU cuda:0 no longer answers")


def test_out_of_memory_is_no_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: NDArray[np.uint8]) -> Result:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        ending_when_lost(full, "cuda:0")(model_inputs(4))


def test_the_second_stream_is_started_before_the_first_is_waited_for() -> None:
    said: list[str] = []

    def start(x: NDArray[np.uint8], stream: str) -> NDArray[np.uint8]:
        said.append(f"start {len(x)} on {stream}")
        return x

    def finish(x: NDArray[np.uint8], stream: str) -> Result:
        said.append(f"finish {len(x)} on {stream}")
        return numbered(x)

    run = over_streams(start, finish, ["a", "b"])
    x = model_inputs(5)
    np.testing.assert_array_equal(run(x)[0], numbered(x)[0])
    assert said == ["start 3 on a", "start 2 on b", "finish 3 on a", "finish 2 on b"]
    said.clear()
    run(x[:1])
    assert said == ["start 1 on a", "finish 1 on a"]


class PlayedGpu(str):
    """The CPU under a GPU's name: networks on it take the code path of CUDA."""

    def startswith(self, prefix: str, *_: int) -> bool:  # type: ignore[override]
        return prefix == "cuda"


class Overflowing(torch.nn.Module):
    """Its first result contains an infinity, like float16 when a number is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[int] = []

    def __deepcopy__(self, _: object) -> Overflowing:
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(len(x))
        means = x.mean((1, 2, 3))[:, None] * self.weight
        return (means / 0 if len(self.seen) == 1 else means), means


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_the_pipeline_of_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    here: list[object] = []

    @contextmanager
    def stream(one: object) -> Iterator[None]:
        here.append(one)
        yield
        here.pop()

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        said.append("pinned")
        return x

    to = torch.Tensor.to

    def copied(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("non_blocking") and said[-1] == "pinned":
            said.append(f"copied on stream {streams.index(here[-1])}")
        return to(x, *args, **options)

    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(object()) or streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    stage, net = load_bundle(make_bundle(tmp_path / "b")).disease, Overflowing()
    run = torch_engine._runner(net, stage, PlayedGpu("cpu"))  # type: ignore[arg-type]
    x = model_inputs(5)
    logits, _ = run(x)
    np.testing.assert_allclose(logits[:, 0], (x.mean((1, 2)) / 255 - 0.5) / 0.5, atol=1e-5)
    assert said == ["pinned", "copied on stream 0", "pinned", "copied on stream 1"]
    assert net.seen == [3, 2, 3], "the part that overflowed is done again in full, the other is not"


def test_replicas_share_a_batch_and_keep_its_order() -> None:
    run = over_replicas([numbered, numbered, numbered])
    for n in (1, 2, 8):
        x = model_inputs(n)
        np.testing.assert_array_equal(run(x)[0], numbered(x)[0])


def test_a_device_that_is_not_there() -> None:
    assert torch_devices("cpu") == ["cpu"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Fatal, match="no CUDA device 1") as caught:
        torch_devices("cuda:1,2")
    assert caught.value.exit_code is ExitCode.DEVICE_MISSING


class Device:
    """A clock and a device: `overhead_s` a batch and `image_s` an image, with memory for `room` images."""

    def __init__(self, overhead_s: float, image_s: float, room: int = 1000) -> None:
        self.overhead_s, self.image_s, self.room, self.now = overhead_s, image_s, room, 0.0

    def __call__(self, x: NDArray[np.uint8]) -> Result:
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.now += self.overhead_s + self.image_s * len(x)
        return numbered(x)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device(0.001, 0.001), 16),  # 16 images do not notice the overhead
        (Device(0.01, 0.001), 128),
        (Device(10, 0.001), 256),
        (Device(10, 0.001, room=100), 64),
        (Device(10, 0.001, room=3), 16),  # halving_on_oom does the rest
    ],
)
def test_the_batch_of_a_gpu_is_found_by_trying(device: Device, expected: int) -> None:
    assert fastest_batch(device, 64, device.clock) == expected


def test_a_batch_is_shared_by_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stage = load_bundle(make_bundle(tmp_path / "b")).disease
    cpu = TorchEngine("cpu")
    cpu.load(stage)
    assert cpu.batch_size == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch_engine, "_runner", lambda net, stage, device: Device(0, 0, room=40))
    monkeypatch.setattr(torch_engine, "fastest_batch", lambda run, side: 32)  # the clock of a busy machine is no reason
    one, both = TorchEngine("auto"), TorchEngine("cuda:0,1")
    assert (one.device, both.device) == ("cuda:0", "cuda:0,cuda:1")
    one.load(stage)
    both.load(stage)
    assert (one.batch_size, both.batch_size) == (32, 64)
