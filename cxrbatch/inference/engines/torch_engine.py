"""PyTorch on CPU and CUDA.

On CUDA it has been tested only with simulated devices (out of memory, several replicas), since no GPU was available.
See docs/performance.md.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.engines.networks import FeatureNetwork, build_network, load_state, read_state
from cxrbatch.inference.engines.protocol import Network
from cxrbatch.inference.model_spec import ModelSpec

__all__ = [
    "TorchEngine",
    "ending_when_lost",
    "fastest_batch",
    "halving_on_oom",
    "load_network",
    "over_replicas",
    "over_streams",
    "torch_devices",
]

_CPU_BATCH = 8  # larger batches are slower on a CPU: glibc maps and unmaps their activations
_CUDA_BATCHES = (16, 32, 64, 128, 256)  # the fastest one is found by measuring
_STREAMS = 2  # per GPU: one copies while the other computes
_WORTH = 1.05  # a larger batch must give this many times the images per second

Result = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.uint8]], Result]
Stream = TypeVar("Stream")
Started = TypeVar("Started")


def torch_devices(wanted: str) -> list[str]:
    """'auto', 'cpu', 'cuda' or 'cuda:0,1' -> the torch devices to use.

    Raises Fatal (exit 13) if a requested device is missing.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not there):
        return ["cpu"]
    numbers = [int(n) for n in wanted.partition(":")[2].split(",") if n] or [0]
    missing = [n for n in numbers if n >= there]
    if missing:
        raise Fatal(
            f"There is no CUDA device {missing[0]} ({there} found); use --device cpu, or see `cxrbatch doctor`.",
            ExitCode.DEVICE_MISSING,
        )
    return [f"cuda:{n}" for n in numbers]


class TorchEngine:
    """Batch norm folded into the convolutions, channels last, and on CUDA half precision where it stays finite."""

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, device: str = "auto") -> None:
        self._devices = torch_devices(device)
        self.device = ",".join(self._devices)
        self.batch_size = _CPU_BATCH if self.device == "cpu" else _CUDA_BATCHES[-1] * len(self._devices)

    def load(self, stage: ModelSpec) -> Network:
        """Load the stage on each device. On CUDA, also measure which `batch_size` is fastest."""
        net = load_network(stage)
        runners = [_runner(net, stage, device) for device in self._devices]
        if self.device != "cpu":
            runners = [ending_when_lost(run, device) for run, device in zip(runners, self._devices, strict=True)]
            self.batch_size = min(self.batch_size, fastest_batch(runners[0], stage.model_input.size) * len(runners))
        return over_replicas([halving_on_oom(run) for run in runners])


def load_network(stage: ModelSpec) -> FeatureNetwork:
    """The stage's network in eval mode, float32 on the CPU, batch norm folded."""
    with torch.device("meta"):  # no random weights: drawing them takes seconds
        net = build_network(stage.architecture, stage.channels, len(stage.classes))
    load_state(net, read_state(stage.weights))
    _fold_batch_norm(net.eval())
    return net


def _runner(net: FeatureNetwork, stage: ModelSpec, device: str) -> Run:
    """A function from model inputs to results, both in host memory, that runs on one device."""
    on_cuda = device.startswith("cuda")
    halved = on_cuda and not stage.int8  # whose sums of whole numbers do not fit into half precision
    net = copy.deepcopy(net).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean = torch.tensor(stage.mean, device=device).view(1, -1, 1, 1) * 255
    std = torch.tensor(stage.std, device=device).view(1, -1, 1, 1) * 255

    def forward(model_inputs: Tensor, half: bool) -> tuple[Tensor, Tensor]:
        x = (model_inputs.to(torch.float32) - mean) / std
        with torch.autocast("cuda", torch.float16, enabled=half):
            logits, features = net(x.contiguous(memory_format=torch.channels_last))
        return logits.float(), features.float()

    @torch.inference_mode()
    def start(model_inputs: NDArray[np.uint8], stream: torch.cuda.Stream | None) -> tuple[Tensor, Tensor, Tensor]:
        host = torch.from_numpy(np.ascontiguousarray(model_inputs))[:, None]
        with torch.cuda.stream(stream):  # no effect for None
            x = host.pin_memory().to(device, non_blocking=True) if on_cuda else host
            return x, *forward(x, half=halved)

    @torch.inference_mode()
    def finish(started: tuple[Tensor, Tensor, Tensor], stream: torch.cuda.Stream | None) -> Result:
        x, logits, features = started
        with torch.cuda.stream(stream):
            if halved and not (logits.isfinite().all() and features.isfinite().all()):
                logits, features = forward(x, half=False)  # float16 overflowed: repeat in float32
            return logits.cpu().numpy(), features.cpu().numpy()

    if not on_cuda:
        return over_streams(start, finish, [None])
    torch.cuda.synchronize(device)  # the weights were copied on another stream
    return over_streams(start, finish, [torch.cuda.Stream(device) for _ in range(_STREAMS)])  # type: ignore[no-untyped-call]


def over_streams(
    start: Callable[[NDArray[np.uint8], Stream], Started],
    finish: Callable[[Started, Stream], Result],
    streams: Sequence[Stream],
) -> Run:
    """Run a part of each batch on every stream of a device: start all parts before waiting for the first."""

    def run(model_inputs: NDArray[np.uint8]) -> Result:
        parts = [part for part in np.array_split(model_inputs, len(streams)) if len(part)]
        started = [start(part, stream) for part, stream in zip(parts, streams, strict=False)]
        return _joined([finish(one, stream) for one, stream in zip(started, streams, strict=False)])

    return run


def ending_when_lost(run: Run, device: str) -> Run:
    """Raise Fatal if a call fails and the device no longer responds.

    After some CUDA errors (an illegal access, a failed assertion, a GPU that fell off the bus), every later call of the
    process fails, and only a new process can use the device again.
    """

    def run_or_end(model_inputs: NDArray[np.uint8]) -> Result:
        try:
            return run(model_inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if _answers(device):
                raise
            raise Fatal(
                f"The GPU {device} no longer answers ({type(error).__name__}); what is committed is kept. Start "
                "cxrbatch again (systemd does), and see `nvidia-smi` and the kernel's log when this comes back."
            ) from error

    return run_or_end


def _answers(device: str) -> bool:
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except torch.cuda.OutOfMemoryError:
        return True
    except Exception:
        return False
    return True


def fastest_batch(run: Run, side: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The fastest batch size for model inputs (side, side): doubled while that is faster and fits in memory."""
    best, best_rate = _CUDA_BATCHES[0], 0.0
    for size in _CUDA_BATCHES:
        model_inputs = np.zeros((size, side, side), np.uint8)
        try:
            run(model_inputs)  # the first one chooses kernels and takes memory
            started = clock()
            run(model_inputs)
            rate = size / max(clock() - started, 1e-9)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate < best_rate * _WORTH:
            break
        best, best_rate = size, rate
    return best


def halving_on_oom(run: Run) -> Run:
    """Run a batch; if the device runs out of memory, continue in halves and never try that size again."""
    limit = sys.maxsize

    def run_in_parts(model_inputs: NDArray[np.uint8]) -> Result:
        nonlocal limit
        parts: list[Result] = []
        start = 0
        while start < len(model_inputs):
            part = model_inputs[start : start + limit]
            try:
                parts.append(run(part))
                start += len(part)
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
                limit = len(part) // 2
                torch.cuda.empty_cache()
        return _joined(parts)

    return run_in_parts


def over_replicas(runs: Sequence[Run]) -> Run:
    """Split each batch over several replicas, one thread per replica; the order is kept."""
    if len(runs) == 1:
        return runs[0]
    threads = ThreadPoolExecutor(len(runs), thread_name_prefix="replica")

    def run_split(model_inputs: NDArray[np.uint8]) -> Result:
        parts = [part for part in np.array_split(model_inputs, len(runs)) if len(part)]
        return _joined(list(threads.map(lambda run, part: run(part), runs, parts)))

    return run_split


def _joined(parts: Sequence[Result]) -> Result:
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold each BatchNorm2d into the Conv2d directly before it, in place. Exact up to rounding."""
    for child in module.children():
        _fold_batch_norm(child)
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1):
            convolution, norm = module[i], module[i + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(convolution, norm)
                module[i + 1] = nn.Identity()
