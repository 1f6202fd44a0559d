"""Model bundles: a manifest, safetensors weights and a card in one folder (docs/bundle-format.md).

Format, hashes and class counts are checked before any weight is used. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.types import ModelInputSpec

__all__ = [
    "ARCHITECTURES",
    "FORMAT",
    "SHIPPED",
    "Bundle",
    "ModelSpec",
    "Ood",
    "OtherOutput",
    "as_written",
    "find_bundle",
    "load_bundle",
    "manifest_digest",
    "shipped_bundles",
]

FORMAT = 5
#: What `engines/networks.py` can build; listed here because reading a bundle must not import PyTorch.
ARCHITECTURES = frozenset({"mobilenet_v2", "mobilenet_v2_int8", "mobilenet_v3_large"})
_SEALED = 3  # the first format whose manifest carries its own digest
_UNSEAL = 'restore it, or take its top-level "sha256" out and set "format" to 2 if you changed it on purpose'
_EXACT = " exact"
SHIPPED = Path(__file__).parents[1] / "bundles"
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


@dataclass(frozen=True, slots=True)
class Bundle:
    """A cascade on disk, verified."""

    path: Path
    name: str
    version: str
    manifest_sha256: str  # identifies the cascade; covers the weights through their hashes
    manifest: dict[str, Any]
    stages: tuple[ModelSpec, ...]

    @property
    def gate(self) -> ModelSpec | None:
        return next((stage for stage in self.stages if stage.role == "gate"), None)

    @property
    def disease(self) -> ModelSpec:
        return next(stage for stage in self.stages if stage.role == "disease")

    def key(self, exact: bool) -> str:
        """The key of this cascade in the store. Decoding `exact` changes the numbers, so it is another cascade."""
        return self.manifest_sha256 + _EXACT * exact

    @property
    def input_specs(self) -> tuple[ModelInputSpec, ...]:
        return tuple(dict.fromkeys(stage.model_input for stage in self.stages))


def shipped_bundles() -> list[Path]:
    """The folders of the bundles inside the package."""
    return sorted(path.parent for path in SHIPPED.glob("*/manifest.json"))


def find_bundle(name_or_folder: str | Path) -> Path:
    """The folder of a shipped bundle by its name, or of any bundle by its path: a text with a slash, or a Path.

    Raises Fatal (exit 12), also where a name is that of a shipped bundle and of another bundle in the working folder.
    """
    own, shipped = Path(name_or_folder), SHIPPED / name_or_folder
    is_name = isinstance(name_or_folder, str) and "/" not in name_or_folder
    found = []
    for folder in (shipped, own) if is_name else (own,):
        try:
            if (folder / "manifest.json").is_file():
                found.append(folder)
        except OSError as error:
            raise _refused(folder, f"it cannot be read ({error.strerror})") from None
    if len(found) == 2 and not own.samefile(shipped):
        raise Fatal(
            f"There is a shipped bundle '{own}' and a bundle of this name in this folder: write ./{own} for that one, "
            f"or {shipped} for the shipped one.",
            ExitCode.BUNDLE_UNUSABLE,
        )
    if found:
        return found[0]
    names = ", ".join(path.name for path in shipped_bundles()) or "none"
    raise Fatal(
        f"There is no bundle '{name_or_folder}': it is neither a shipped one ({names}) nor a folder with a "
        "manifest.json.",
        ExitCode.BUNDLE_UNUSABLE,
    )


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Read and verify a bundle. Weights are hashed here; an engine loads them.

    Raises Fatal (exit 12) if anything is missing, damaged, renamed, or newer than this program.
    """
    folder = find_bundle(name_or_folder)
    try:
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] > FORMAT:
            raise _refused(folder, f"its format {manifest['format']} is newer than this program; upgrade cxrbatch")
        if not as_written(manifest):
            raise _refused(folder, f"its manifest.json is not what was written (its SHA-256 differs); {_UNSEAL}")
        for key in ("name", "version"):
            if not isinstance(manifest[key], str) or not manifest[key]:
                raise _refused(folder, f"the {key} in its manifest.json is no text")
        stages = tuple(_stage(folder, part) for part in manifest["stages"])
        bundle = Bundle(
            folder, manifest["name"], manifest["version"], hashlib.sha256(raw).hexdigest(), manifest, stages
        )
        roles = [stage.role for stage in stages]
        if roles not in (["gate", "disease"], ["disease"]):
            raise _refused(folder, f"its stages are {roles}, and must be a disease model, or a gate and one")
    except OSError as error:
        raise _refused(folder, f"it cannot be read ({error.strerror})") from None
    except RecursionError:
        raise _refused(folder, "its manifest.json is nested too deeply") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refused(folder, f"its manifest.json is not usable ({type(error).__name__}: {error})") from None
    return bundle


def as_written(manifest: dict[str, Any]) -> bool:
    """Whether a manifest matches its own digest; before format 3 it may have none. Raises KeyError."""
    carries = "sha256" in manifest or manifest["format"] >= _SEALED
    return not carries or bool(manifest["sha256"] == manifest_digest(manifest))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without this digest itself; independent of white space and the order of keys."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stage(folder: Path, part: dict[str, Any]) -> ModelSpec:
    role, classes, channels = part["role"], tuple(part["classes"]), int(part["channels"])
    fits = len(classes) in (1, 2) if role == "gate" else len(classes) > 1
    if len(classes) != len(set(classes)) or not fits or not all(isinstance(name, str) and name for name in classes):
        raise _refused(folder, f"the classes of its {role} stage do not fit: {list(classes)}")
    if len(part["mean"]) != channels or len(part["std"]) != channels:
        raise _refused(folder, f"the mean and std of its {role} stage do not have {channels} channel(s)")
    if not all(map(math.isfinite, [*part["mean"], *part["std"]])) or not all(part["std"]):
        raise _refused(folder, f"the mean or the std of its {role} stage is impossible")
    if role == "gate" and not 0 <= float(part.get("review_from", 0)) <= 1:
        raise _refused(folder, "the review_from of its gate stage is impossible")
    if part["architecture"] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise _refused(folder, f"this program has no network '{part['architecture']}' ({known})")
    temperature, threshold = float(part["temperature"]), float(part["threshold"])
    if not (math.isfinite(temperature) and temperature > 0 and 0 <= threshold <= 1):
        raise _refused(folder, f"the temperature or the threshold of its {role} stage is impossible")
    weights = folder / part["weights"]
    if weights.parent != folder or not weights.is_file():
        raise _refused(folder, f"its weights file {part['weights']} is missing")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != part["sha256"]:
        raise _refused(folder, f"{weights.name} is not the file that the manifest describes (its SHA-256 differs)")
    try:
        with safe_open(weights, framework="numpy") as tensors:
            ood = _ood(folder, tensors, part.get("ood"))
            outputs = _outputs(tensors)
            other = _other(tensors)
    except SafetensorError as error:
        raise _refused(folder, f"{weights.name} is not a safetensors file ({error})") from None
    if outputs != len(classes):
        raise _refused(
            folder, f"{weights.name} has {outputs} output(s) and the manifest names {len(classes)} class(es)"
        )
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
        raise _refused(folder, "the frontal_threshold of its gate stage is impossible")
    return threshold


def _label_set(folder: Path, part: dict[str, Any], classes: tuple[str, ...]) -> tuple[float, ...] | None:
    if "label_set" not in part:
        return None
    thresholds = {name: float(value) for name, value in part["label_set"]["thresholds"].items()}
    if set(thresholds) != set(classes) or not all(0 <= value <= 1 for value in thresholds.values()):
        raise _refused(folder, "the label_set thresholds of its disease stage do not fit its classes")
    return tuple(thresholds[name] for name in classes)


def _model_input(folder: Path, given: dict[str, Any]) -> ModelInputSpec:
    model_input, kinds = ModelInputSpec(**given), get_type_hints(ModelInputSpec)
    known = all(getattr(model_input, key) in get_args(kinds[key]) for key in ("fit", "interpolation"))
    if not known or type(model_input.size) is not int or not 1 <= model_input.size <= _LARGEST_MODEL_INPUT:
        raise _refused(folder, f"there is no such model input as {given}")
    return model_input


def _ood(folder: Path, tensors: Any, part: dict[str, Any] | None) -> Ood | None:
    if part is None:
        return None
    if not 0 < float(part["threshold"]) < math.inf:
        raise _refused(folder, "the threshold of its unlike-training score is impossible")
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


def _refused(folder: Path, why: str) -> Fatal:
    return Fatal(f"The bundle {folder} is refused: {why}.", ExitCode.BUNDLE_UNUSABLE)
