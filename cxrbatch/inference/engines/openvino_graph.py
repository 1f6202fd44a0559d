"""MobileNetV2 as an OpenVINO graph, built directly from a bundle's tensors in half a second, without PyTorch.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks". Tensors have torchvision's names.
Batch norm is folded into the convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Model
from openvino import opset8 as ops
from safetensors import safe_open

from cxrbatch.inference.bundle import ModelSpec

__all__ = ["mobilenet_v2"]

_BLOCKS = 17  # inverted residuals, features.1 to features.17
_HALVING = frozenset({2, 4, 7, 14})  # those with stride 2
_EPSILON = 1e-5  # of batch norm

Floats = NDArray[np.float32]


def mobilenet_v2(stage: ModelSpec) -> Model:
    """Model inputs u8 (n, 1, size, size) -> logits (n, classes), pooled features (n, d); normalisation is part of it.

    Raises KeyError when a tensor is missing.
    """
    with safe_open(stage.weights, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith("network.")]  # noqa: SIM118
        state = {name.removeprefix("network."): file.get_tensor(name).astype(np.float32) for name in names}
    first = state["features.0.0.weight"]
    if first.shape[1] == 3 and stage.channels == 1:
        state["features.0.0.weight"] = first.sum(1, keepdims=True)  # a colour checkpoint with grey input
    size = stage.model_input.size
    model_inputs = ops.parameter([-1, 1, size, size], np.uint8, name="model_inputs")
    mean, std = (np.asarray(of, np.float32).reshape(1, -1, 1, 1) * 255 for of in (stage.mean, stage.std))
    x = ops.divide(ops.subtract(ops.convert(model_inputs, "f32"), mean), std)
    x = _relu6(_convolution(x, state, "features.0.0", "features.0.1", 2))
    for number in range(1, _BLOCKS + 1):
        x = _inverted_residual(x, state, number)
    x = _relu6(_convolution(x, state, f"features.{_BLOCKS + 1}.0", f"features.{_BLOCKS + 1}.1"))
    features = ops.reduce_mean(x, np.array([2, 3]), False)
    logits = ops.matmul(features, state["classifier.1.weight"], False, True)
    return Model([ops.add(logits, state["classifier.1.bias"][None]), features], [model_inputs], stage.role)


def _inverted_residual(x: Any, state: dict[str, Floats], number: int) -> Any:
    """Expand (except in the first), depthwise convolution, project; plus the input if the shapes are equal."""
    block = f"features.{number}.conv"
    y, part = x, 0
    if f"{block}.3.weight" in state:
        y = _relu6(_convolution(y, state, f"{block}.0.0", f"{block}.0.1"))
        part = 1
    stride = 2 if number in _HALVING else 1
    y = _relu6(_convolution(y, state, f"{block}.{part}.0", f"{block}.{part}.1", stride))
    y = _convolution(y, state, f"{block}.{part + 1}", f"{block}.{part + 2}")
    same_shape = stride == 1 and x.get_output_partial_shape(0)[1] == y.get_output_partial_shape(0)[1]
    return ops.add(x, y) if same_shape else y


def _convolution(x: Any, state: dict[str, Floats], convolution: str, norm: str, stride: int = 1) -> Any:
    """Convolution (depthwise if its weights are (n, 1, k, k) for n channels) with its batch norm folded in."""
    weights = state[f"{convolution}.weight"]
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + np.float32(_EPSILON))
    shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    weights = weights * scale[:, None, None, None]
    channels = x.get_output_partial_shape(0)[1].get_length()
    padding, strides = [weights.shape[2] // 2] * 2, [stride, stride]
    if channels == weights.shape[1]:
        y = ops.convolution(x, weights, strides, padding, padding, [1, 1])
    else:
        y = ops.group_convolution(x, weights[:, None], strides, padding, padding, [1, 1])
    return ops.add(y, shift.reshape(1, -1, 1, 1))


def _relu6(x: Any) -> Any:
    return ops.clamp(x, 0.0, 6.0)
