"""One network of a bundle: everything that determines its output, checked as it is read (docs/bundle-format.md)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.types import ModelInputSpec

__all__ = ["ARCHITECTURES", "ModelSpec", "Ood", "OtherOutput", "read_stage", "refused"]

#: What `engines/networks.py` can build; listed here because reading a bundle must not import PyTorch.
ARCHITECTURES = frozenset({"mobilenet_v2", "mobilenet_v2_int8", "mobilenet_v3_large"})
_LARGEST_MODEL_INPUT = 4096  # pixels a side


@dataclass(frozen=True, slots=True)
class Ood:
    """The out-of-distribution statistics and threshold of a stage; see `cascade.ood_scores`."""

    whitening: NDArray[np.float32]  # (k, d)
    means: NDArray[np.float32]  # (classes, k)
    threshold: float
    unit: bool = True  # features are scaled to length one first; not so in bundles of format 1


@dataclass(frozen=True, slots=True)
class OtherOutput:
    """One more output of the disease model's softmax: none of its classes. See `cascade.other_probability`."""

    weight: NDArray[np.float32]  # (d,)
    bias: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One network of a cascade, with everything that determines its output."""

    role: Literal["gate", "disease"]
    architecture: str
    channels: int
    classes: tuple[str, ...]  # gate: a sigmoid each, CHEST and, from format 4 on, FRONTAL; disease: softmax
    model_input: ModelInputSpec
    mean: tuple[float, ...]  # of x / 255, one a channel
    std: tuple[float, ...]
    weights: Path
    sha256: str
    temperature: float
    threshold: float
    ood: Ood | None
    manifest: dict[str, Any]  # this stage's part of the manifest, unchanged
    frontal_threshold: float | None = None  # gate with two outputs: a chest image below it is not a frontal one
    label_set: tuple[float, ...] | None = None  # disease: a class is in the label set from this probability on
    other: OtherOutput | None = None  # disease

    @property
    def int8(self) -> bool:
        """Whether weights and activations are whole numbers of steps: `engines/grids.py`."""
        return self.architecture.endswith("_int8")


def read_stage(folder: Path, part: dict[str, Any]) -> ModelSpec:
    """The stage that `part` of a manifest describes; its weights are hashed. Raises Fatal, KeyError, TypeError."""
    role, classes, channels = part["role"], tuple(part["classes"]), int(part["channels"])
    fits = len(classes) in (1, 2) if role == "gate" else len(classes) > 1
    if len(classes) != len(set(classes)) or not fits or not all(isinstance(name, str) and name for name in classes):
        raise refused(folder, f"the classes of its {role} stage do not fit: {list(classes)}")
    if len(part["mean"]) != channels or len(part["std"]) != channels:
        raise refused(folder, f"the mean and std of its {role} stage do not have {channels} channel(s)")
    if not all(map(math.isfinite, [*part["mean"], *part["std"]])) or not all(part["std"]):
        raise refused(folder, f"the mean or the std of its {role} stage is impossible")
    if role == "gate" and not 0 <= float(part.get("review_from", 0)) <= 1:
        raise refused(folder, "the review_from of its gate stage is impossible")
    if part["architecture"] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise refused(folder, f"this program has no network '{part['architecture']}' ({known})")
    temperature, threshold = float(part["temperature"]), float(part["threshold"])
    if not (math.isfinite(temperature) and temperature > 0 and 0 <= threshold <= 1):
        raise refused(folder, f"the temperature or the threshold of its {role} stage is impossible")
    weights = folder / part["weights"]
    if weights.parent != folder or not weights.is_file():
        raise refused(folder, f"its weights file {part['weights']} is missing")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != part["sha256"]:
        raise refused(folder, f"{weights.name} is not the file that the manifest describes (its SHA-256 differs)")
    try:
        with safe_open(weights, framework="numpy") as tensors:
            ood = _ood(folder, tensors, part.get("ood"))
            outputs = _outputs(tensors)
            other = _other(tensors)
    except SafetensorError as error:
        raise refused(folder, f"{weights.name} is not a safetensors file ({error})") from None
    if outputs != len(classes):
        raise refused(folder, f"{weights.name} has {outputs} output(s) and the manifest names {len(classes)} class(es)")
    return ModelSpec(
        role,
        part["architecture"],
        channels,
        classes,
        _model_input(folder, part["model_input"] if "model_input" in part else part["plane"]),
        tuple(part["mean"]),
        tuple(part["std"]),
        weights,
        part["sha256"],
        temperature,
        threshold,
        ood,
        part,
        _frontal_threshold(folder, part, classes) if role == "gate" else None,
        _label_set(folder, part, classes) if role == "disease" else None,
        other if role == "disease" else None,
    )


def _frontal_threshold(folder: Path, part: dict[str, Any], classes: tuple[str, ...]) -> float | None:
    if len(classes) == 1:
        return None
    threshold = float(part["frontal_threshold"])
    if not 0 <= threshold <= 1:
        raise refused(folder, "the frontal_threshold of its gate stage is impossible")
    return threshold


def _label_set(folder: Path, part: dict[str, Any], classes: tuple[str, ...]) -> tuple[float, ...] | None:
    if "label_set" not in part:
        return None
    thresholds = {name: float(value) for name, value in part["label_set"]["thresholds"].items()}
    if set(thresholds) != set(classes) or not all(0 <= value <= 1 for value in thresholds.values()):
        raise refused(folder, "the label_set thresholds of its disease stage do not fit its classes")
    return tuple(thresholds[name] for name in classes)


def _model_input(folder: Path, given: dict[str, Any]) -> ModelInputSpec:
    model_input, kinds = ModelInputSpec(**given), get_type_hints(ModelInputSpec)
    known = all(getattr(model_input, key) in get_args(kinds[key]) for key in ("fit", "interpolation"))
    if not known or type(model_input.size) is not int or not 1 <= model_input.size <= _LARGEST_MODEL_INPUT:
        raise refused(folder, f"there is no such model input as {given}")
    return model_input


def _ood(folder: Path, tensors: Any, part: dict[str, Any] | None) -> Ood | None:
    if part is None:
        return None
    if not 0 < float(part["threshold"]) < math.inf:
        raise refused(folder, "the threshold of its unlike-training score is impossible")
    return Ood(
        tensors.get_tensor("ood.whitening").astype(np.float32),
        tensors.get_tensor("ood.means").astype(np.float32),
        float(part["threshold"]),
        part.get("features") == "unit",
    )


def _other(tensors: Any) -> OtherOutput | None:
    if "other.weight" not in tensors.keys():  # noqa: SIM118  # not a dict
        return None
    weight = tensors.get_tensor("other.weight").astype(np.float32)
    return OtherOutput(weight, float(tensors.get_tensor("other.bias")[0]))


def _outputs(tensors: Any) -> int:
    """The number of logits: the length of the last classifier bias."""
    biases = [k for k in tensors.keys() if k.startswith("network.classifier.") and k.endswith(".bias")]  # noqa: SIM118
    last = max(biases, key=lambda k: int(k.split(".")[-2]), default=None)
    return int(tensors.get_slice(last).get_shape()[0]) if last else 0


def refused(folder: Path, why: str) -> Fatal:
    """What is raised for a bundle that cannot be used: one sentence, exit 12."""
    return Fatal(f"The bundle {folder} is refused: {why}.", ExitCode.BUNDLE_UNUSABLE)
