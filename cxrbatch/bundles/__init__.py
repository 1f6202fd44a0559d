"""Model bundles: a manifest, safetensors weights and a card in one folder (docs/bundle-format.md).

Everything is checked before a weight is used: format, hashes, class counts. No pickle is ever read.
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
from cxrbatch.nouns import PlaneSpec

__all__ = [
    "ARCHITECTURES",
    "FORMAT",
    "SHIPPED",
    "Bundle",
    "Ood",
    "Stage",
    "as_written",
    "find_bundle",
    "load_bundle",
    "manifest_digest",
    "shipped_bundles",
]

FORMAT = 3
#: What `engines/networks.py` can build, named here because reading a bundle needs no PyTorch.
ARCHITECTURES = frozenset({"mobilenet_v2", "mobilenet_v3_large"})
_SEALED = 3  # the first format whose manifest carries its own digest
_UNSEAL = 'restore it, or take its top-level "sha256" out and set "format" to 2 if you changed it on purpose'
_EXACT = " exact"
SHIPPED = Path(__file__).parent
_LARGEST_PLANE = 4096  # pixels a side


@dataclass(frozen=True, slots=True)
class Ood:
    """How unlike its training data a stage's features may be; see `cascade.ood_scores`."""

    whitening: NDArray[np.float32]  # (k, d)
    means: NDArray[np.float32]  # (classes, k)
    threshold: float
    unit: bool = True  # features are scaled to length one first; not so in bundles of format 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One network of a cascade, with everything that its numbers depend on."""

    role: Literal["gate", "disease"]
    architecture: str
    channels: int
    classes: tuple[str, ...]  # gate: one name, sigmoid; disease: softmax in this order
    plane: PlaneSpec
    mean: tuple[float, ...]  # of x / 255, one a channel
    std: tuple[float, ...]
    weights: Path
    sha256: str
    temperature: float
    threshold: float
    ood: Ood | None
    manifest: dict[str, Any]  # this stage's part of the manifest, as it stands


@dataclass(frozen=True, slots=True)
class Bundle:
    """A cascade on disk, verified."""

    path: Path
    name: str
    version: str
    manifest_sha256: str  # covers the weights too, through their hashes: the identity of the cascade
    manifest: dict[str, Any]
    stages: tuple[Stage, ...]

    @property
    def gate(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.role == "gate"), None)

    @property
    def disease(self) -> Stage:
        return next(stage for stage in self.stages if stage.role == "disease")

    def key(self, exact: bool) -> str:
        """What tells this cascade in the store from any other: the same pictures read `exact` are other numbers."""
        return self.manifest_sha256 + _EXACT * exact

    @property
    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        return tuple(dict.fromkeys(stage.plane for stage in self.stages))


def shipped_bundles() -> list[Path]:
    """The folders of the bundles inside the package."""
    return sorted(path.parent for path in SHIPPED.glob("*/manifest.json"))


def find_bundle(name_or_folder: str) -> Path:
    """The folder of a shipped bundle by its name, or of any bundle by its path.

    Raises Fatal (exit 12).
    """
    for folder in (SHIPPED / name_or_folder, Path(name_or_folder)):
        try:
            if (folder / "manifest.json").is_file():
                return folder
        except OSError as error:
            raise _refused(folder, f"it cannot be read ({error.strerror})") from None
    names = ", ".join(path.name for path in shipped_bundles()) or "none"
    raise Fatal(
        f"There is no bundle '{name_or_folder}': no shipped one has this name (shipped: {names}) and no folder of it "
        "has a manifest.json.",
        ExitCode.BUNDLE_UNUSABLE,
    )


def load_bundle(name_or_folder: str | Path) -> Bundle:
    """Read and verify a bundle. Weights are hashed here, and loaded by an engine.

    Raises Fatal (exit 12) in one sentence when anything is missing, damaged, renamed, or newer than this program.
    """
    folder = find_bundle(str(name_or_folder))
    try:
        raw = (folder / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] > FORMAT:
            raise _refused(folder, f"its format {manifest['format']} is newer than this program; upgrade cxrbatch")
        if not as_written(manifest):
            raise _refused(folder, f"its manifest.json is not what was written (its SHA-256 differs); {_UNSEAL}")
        stages = tuple(_stage(folder, part) for part in manifest["stages"])
        bundle = Bundle(
            folder, manifest["name"], manifest["version"], hashlib.sha256(raw).hexdigest(), manifest, stages
        )
        roles = [stage.role for stage in stages]
        if roles not in (["gate", "disease"], ["disease"]):
            raise _refused(folder, f"its stages are {roles}, and must be a disease model, or a gate and one")
    except OSError as error:
        raise _refused(folder, f"it cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(folder, f"its manifest.json is not usable ({type(error).__name__}: {error})") from None
    return bundle


def as_written(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has the digest that it carries; before format 3 it may carry none. Raises KeyError."""
    carries = "sha256" in manifest or manifest["format"] >= _SEALED
    return not carries or bool(manifest["sha256"] == manifest_digest(manifest))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of all that a manifest says, but for this digest itself; spaces and the order of keys are free."""
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _stage(folder: Path, part: dict[str, Any]) -> Stage:
    role, classes, channels = part["role"], tuple(part["classes"]), int(part["channels"])
    if len(classes) != len(set(classes)) or not classes or (role == "gate") != (len(classes) == 1):
        raise _refused(folder, f"the classes of its {role} stage do not fit: {list(classes)}")
    if len(part["mean"]) != channels or len(part["std"]) != channels:
        raise _refused(folder, f"the mean and std of its {role} stage do not have {channels} channel(s)")
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
            ood = _ood(tensors, part.get("ood"))
            outputs = _outputs(tensors)
    except SafetensorError as error:
        raise _refused(folder, f"{weights.name} is not a safetensors file ({error})") from None
    if outputs != len(classes):
        raise _refused(
            folder, f"{weights.name} has {outputs} output(s) and the manifest names {len(classes)} class(es)"
        )
    return Stage(
        role,
        part["architecture"],
        channels,
        classes,
        _plane(folder, part["plane"]),
        tuple(part["mean"]),
        tuple(part["std"]),
        weights,
        part["sha256"],
        temperature,
        threshold,
        ood,
        part,
    )


def _plane(folder: Path, given: dict[str, Any]) -> PlaneSpec:
    plane, kinds = PlaneSpec(**given), get_type_hints(PlaneSpec)
    known = all(getattr(plane, key) in get_args(kinds[key]) for key in ("fit", "interpolation"))
    if not known or type(plane.size) is not int or not 1 <= plane.size <= _LARGEST_PLANE:
        raise _refused(folder, f"there is no such plane as {given}")
    return plane


def _ood(tensors: Any, part: dict[str, Any] | None) -> Ood | None:
    if part is None:
        return None
    return Ood(
        tensors.get_tensor("ood.whitening").astype(np.float32),
        tensors.get_tensor("ood.means").astype(np.float32),
        float(part["threshold"]),
        part.get("features") == "unit",
    )


def _outputs(tensors: Any) -> int:
    """How many logits the network gives: the length of its last classifier bias."""
    biases = [k for k in tensors.keys() if k.startswith("network.classifier.") and k.endswith(".bias")]  # noqa: SIM118
    last = max(biases, key=lambda k: int(k.split(".")[-2]), default=None)
    return int(tensors.get_slice(last).get_shape()[0]) if last else 0


def _refused(folder: Path, why: str) -> Fatal:
    return Fatal(f"The bundle {folder} is refused: {why}.", ExitCode.BUNDLE_UNUSABLE)
