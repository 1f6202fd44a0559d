"""MobileNetV2 as an OpenVINO graph, built directly from a bundle's tensors in half a second, without PyTorch.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks". Tensors have torchvision's names.
Batch norm is folded into the convolutions. FakeQuantize says which values the weights and activations of
`mobilenet_v2_int8` have; OpenVINO then computes in 8-bit integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Model
from openvino import opset8 as ops
from safetensors import safe_open

from cxrbatch.inference.engines.grids import BLOCK_STEP, COARSE_LEVELS, FINE_LEVELS, RELU6_LEVELS, WEIGHT_LEVELS
from cxrbatch.inference.model_spec import ModelSpec

__all__ = ["mobilenet_v2"]

_BLOCKS = 17  # inverted residuals, features.1 to features.17
_HALVING = frozenset({2, 4, 7, 14})  # those with stride 2
_EPSILON = 1e-5  # of batch norm

Floats = NDArray[np.float32]


def mobilenet_v2(stage: ModelSpec) -> Model:
    """Model inputs u8 (n, 1, size, size) -> logits (n, classes), pooled features (n, d); normalisation is part of it.

    Raises KeyError when a tensor is missing.
    """
    int8 = stage.int8
    with safe_open(stage.weights, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith("network.")]  # noqa: SIM118
        state = {name.removeprefix("network."): file.get_tensor(name).astype(np.float32) for name in names}
    first = state["features.0.0.weight"]
    if first.shape[1] == 3 and stage.channels == 1:
        state["features.0.0.weight"] = first.sum(1, keepdims=True)  # a colour checkpoint with grey input
    size = stage.model_input.size
    model_inputs = ops.parameter([-1, 1, size, size], np.uint8, name="model_inputs")
    mean, std = (np.asarray(of, np.float32).reshape(1, -1, 1, 1) * 255 for of in (stage.mean, stage.std))
    x = ops.convert(model_inputs, "f32")
    x = _rounded(x, 0, 255, -mean / std, (255 - mean) / std) if int8 else ops.divide(ops.subtract(x, mean), std)
    network = _Network(state, int8)
    x = network.activated(x, "features.0.0", "features.0.1", 2)
    for number in range(1, _BLOCKS + 1):
        x = network.inverted_residual(x, number)
    x = network.activated(x, f"features.{_BLOCKS + 1}.0", f"features.{_BLOCKS + 1}.1")
    features = ops.reduce_mean(x, np.array([2, 3]), False)
    logits = ops.matmul(features, state["classifier.1.weight"], False, True)
    return Model([ops.add(logits, state["classifier.1.bias"][None]), features], [model_inputs], stage.role)


class _Network:
    """Adds the parts of a MobileNetV2 to a graph. `fine` chooses a grid: `grids.py`."""

    def __init__(self, state: dict[str, Floats], int8: bool) -> None:
        self._state, self._int8 = state, int8

    def inverted_residual(self, x: Any, number: int) -> Any:
        """Expand (except in the first), depthwise convolution, project; plus the input if the shapes are equal."""
        block = f"features.{number}.conv"
        y, part = x, 0
        if f"{block}.3.weight" in self._state:
            y = self.activated(y, f"{block}.0.0", f"{block}.0.1")
            part = 1
        stride = 2 if number in _HALVING else 1
        y = self.activated(y, f"{block}.{part}.0", f"{block}.{part}.1", stride, fine=True)
        y = self._convolution(y, f"{block}.{part + 1}", f"{block}.{part + 2}", fine=True)
        if stride == 1 and x.get_output_partial_shape(0)[1] == y.get_output_partial_shape(0)[1]:
            y = ops.add(x, y)
        return _rounded(y, -128 * BLOCK_STEP, 127 * BLOCK_STEP) if self._int8 else y

    def activated(self, x: Any, convolution: str, norm: str, stride: int = 1, *, fine: bool = False) -> Any:
        """Convolution, batch norm, ReLU6."""
        x = ops.clamp(self._convolution(x, convolution, norm, stride, fine=fine), 0.0, 6.0)
        # OpenVINO wants 256 levels; of the coarse ones the clamp leaves the lower half
        return _rounded(x, 0, 6 * RELU6_LEVELS / (COARSE_LEVELS if fine else RELU6_LEVELS)) if self._int8 else x

    def _convolution(self, x: Any, convolution: str, norm: str, stride: int = 1, *, fine: bool = False) -> Any:
        """Convolution (depthwise if its weights are (n, 1, k, k) for n channels) with its batch norm folded in."""
        state = self._state
        weights = state[f"{convolution}.weight"]
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + np.float32(_EPSILON))
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        weights = weights * scale[:, None, None, None]
        channels = x.get_output_partial_shape(0)[1].get_length()
        depthwise = channels != weights.shape[1]
        if depthwise:
            weights = weights[:, None]
        padding, strides = [weights.shape[-1] // 2] * 2, [stride, stride]
        if self._int8:
            largest = np.maximum(np.abs(weights).max(tuple(range(1, weights.ndim)), keepdims=True), 1e-12)
            # OpenVINO wants 255 levels; of the coarse ones the middle is used
            top = largest * np.float32(FINE_LEVELS / (FINE_LEVELS if fine else WEIGHT_LEVELS))
            weights = _rounded(weights, -top, top, levels=255)
        convolve = ops.group_convolution if depthwise else ops.convolution
        return ops.add(convolve(x, weights, strides, padding, padding, [1, 1]), shift.reshape(1, -1, 1, 1))


def _rounded(x: Any, low: Any, high: Any, to_low: Any = None, to_high: Any = None, levels: int = 256) -> Any:
    """x in so many equal steps from `low` to `high`, moved to `to_low` and `to_high` where these are given."""
    ends = (low, high, low if to_low is None else to_low, high if to_high is None else to_high)
    return ops.fake_quantize(x, *(np.asarray(end, np.float32) for end in ends), levels)
