"""Write the stages of a bundle (docs/bundle-format.md): weights in float16, hashes, recorded check logits.

New weights get a new file name, and one rename of the manifest makes the change: a program that is killed at any moment
leaves either the old bundle or the new one, never one whose hashes do not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import FORMAT, NOT_CALIBRATED, as_written, manifest_digest
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.inference.engines.verify import check_logits
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.files import locked, write_whole
from cxrbatch.types import ModelInputSpec

__all__ = [
    "INTENDED_USE",
    "LICENCE",
    "ModelDraft",
    "add_gate",
    "change_bundle",
    "change_stage",
    "changing",
    "check_output",
    "shift_logits",
    "take_over",
    "write_stage",
]

#: Of a bundle whose recipe has no `licence` of its own.
LICENCE = "Not stated for the weights: what the licences of the training images and of the first weights allow."
INTENDED_USE = (
    "Sorting frontal chest images for research, with a reader behind it. Not a diagnosis, not a medical device."
)
_ROLES = ("gate", "disease")


@dataclass(frozen=True, slots=True)
class ModelDraft:
    """A trained network that is to become a stage. `state` has torchvision's key names, without a prefix."""

    role: Literal["gate", "disease"]
    architecture: str
    channels: int
    classes: tuple[str, ...]
    model_input: ModelInputSpec
    mean: tuple[float, ...]  # of x / 255, one a channel
    std: tuple[float, ...]
    state: dict[str, Tensor]
    threshold: float = 0.5
    training: dict[str, Any] = field(default_factory=dict)
    frontal_threshold: float = 0.5  # gate with two classes
    other: tuple[Tensor, Tensor] | None = None  # disease: weight (d,) and bias (1,) of an output that is no class


def check_output(folder: Path, *ours: str) -> None:
    """Raise Fatal, before hours of training, unless `folder` is new, empty, a bundle, or holds nothing but `ours`."""
    if folder.is_dir():
        left = (*ours, "findings.safetensors", "*-????????????.safetensors", "*.part")  # by a run that was killed
        foreign = [p.name for p in folder.iterdir() if not any(fnmatch(p.name, name) for name in left)]
        if _manifest(folder) is None and foreign:
            raise Fatal(
                f"{folder} holds other files ({min(foreign)}) and no bundle: name a new or an empty folder with -o, "
                "or that of a bundle.",
                ExitCode.USAGE,
            )
    elif os.path.lexists(folder):
        raise Fatal(f"{folder} is not a folder: name a new one with -o.", ExitCode.USAGE)


def write_stage(
    folder: Path, draft: ModelDraft, *, name: str | None = None, version: str = "", licence: str = ""
) -> str:
    """Add the stage to the bundle in `folder`, or replace the one of the same role; other stages stay.

    Returns the roles that the bundle then has, such as "gate disease".

    A bundle that is there keeps its version and licence where these are "". Temperature is 1, and there is no
    out-of-distribution score and no reference for drift until `calibrate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with changing(folder, wait=True):
        return _write_stage(folder, draft, name, {"version": version, "licence": licence})


def changing(folder: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """Within the block no other process trains a stage of the bundle or calibrates it. Raises Fatal, unless `wait`."""
    advice = "waiting until it is done" if wait else "try again when it is done"
    return locked(folder, f"Another process changes the bundle {folder}: {advice}.", wait=wait)


def _write_stage(folder: Path, draft: ModelDraft, name: str | None, said: dict[str, str]) -> str:
    manifest = _manifest(folder) or {
        "format": FORMAT,
        "name": name or os.path.basename(os.path.abspath(folder)),  # also of "."
        "version": "0.1.0",
        "licence": LICENCE,
        "intended_use": INTENDED_USE,
        "stages": [],
    }
    manifest |= {key: text for key, text in said.items() if text}
    manifest.pop("reference", None)  # it is of the networks before
    part: dict[str, Any] = {
        "role": draft.role,
        "architecture": draft.architecture,
        "channels": draft.channels,
        "classes": list(draft.classes),
        "model_input": asdict(draft.model_input),
        "mean": list(draft.mean),
        "std": list(draft.std),
        "weights": "",  # named by `_put`
        "temperature": 1.0,
        "threshold": draft.threshold,
        "chosen_on": NOT_CALIBRATED,
        "training": draft.training,
        "metrics": {},
    }
    if draft.role == "gate" and len(draft.classes) > 1:
        part["frontal_threshold"] = draft.frontal_threshold
    tensors = {f"network.{key}": _on_disk(value) for key, value in draft.state.items()}
    if draft.other is not None:
        tensors |= {"other.weight": draft.other[0].cpu().contiguous(), "other.bias": draft.other[1].cpu().contiguous()}
    _put(folder, manifest, part, tensors)
    return " ".join(stage["role"] for stage in manifest["stages"])


def change_stage(
    folder: Path,
    role: str,
    changes: dict[str, Any],
    ood: tuple[NDArray[np.float32], NDArray[np.float32], float] | None = None,
) -> None:
    """Change manifest keys of a stage; with `ood` (whitening (k, d), means (c, k), threshold) its tensors too.

    They are of features scaled to length one.

    Raises Fatal when the bundle has no such stage.
    """
    manifest = _manifest(folder)
    part = next((p for p in (manifest or {}).get("stages", ()) if p["role"] == role), None)
    if manifest is None or part is None:
        raise Fatal(f"The bundle {folder} has no {role} stage.")
    part = part | changes
    tensors = load_file(folder / part["weights"])
    if ood is not None:
        whitening, means, threshold = ood
        tensors["ood.whitening"] = torch.from_numpy(np.ascontiguousarray(whitening, np.float32))
        tensors["ood.means"] = torch.from_numpy(np.ascontiguousarray(means, np.float32))
        part["ood"] = {"threshold": threshold, "features": "unit"}
    _put(folder, manifest, part, tensors)


def shift_logits(folder: Path, role: str, constants: NDArray[np.float64]) -> None:
    """Add constants (classes,) to a stage's logits, in the last bias of its weights. Raises Fatal without the stage."""
    manifest = _manifest(folder)
    part = next((p for p in (manifest or {}).get("stages", ()) if p["role"] == role), None)
    if manifest is None or part is None:
        raise Fatal(f"The bundle {folder} has no {role} stage.")
    tensors = load_file(folder / part["weights"])
    biases = [k for k in tensors if k.startswith("network.classifier.") and k.endswith(".bias")]
    last = max(biases, key=lambda k: int(k.split(".")[-2]))
    tensors[last] = tensors[last] + torch.from_numpy(constants).to(tensors[last].dtype)
    _put(folder, manifest, dict(part), tensors)


def change_bundle(folder: Path, changes: dict[str, Any]) -> None:
    """Change top-level keys of the manifest, such as `reference`. Raises Fatal when there is no bundle."""
    manifest = _manifest(folder)
    if manifest is None:
        raise Fatal(f"The folder {folder} holds no bundle.")
    _put_manifest(folder, manifest | changes)


def take_over(made: Path, folder: Path) -> None:
    """Make the bundle in `folder` the one in `made`, a folder on the same disk, whose weights are moved."""
    manifest = _manifest(made)
    assert manifest is not None
    for stage in manifest["stages"]:
        os.replace(made / stage["weights"], folder / stage["weights"])
    _put_manifest(folder, manifest)


def add_gate(folder: Path, gate: ModelSpec) -> None:
    """Put another bundle's gate into the bundle in `folder`, in place of its own if it has one.

    Raises Fatal when there is no bundle.
    """
    with changing(folder):
        manifest = _manifest(folder)
        if manifest is None:
            raise Fatal(f"The folder {folder} holds no bundle.")
        data = gate.weights.read_bytes()
        if hashlib.sha256(data).hexdigest() != gate.sha256:
            raise Fatal(f"{gate.weights} has changed meanwhile; try again.")
        part = gate.manifest | {"weights": f"gate-{gate.sha256[:12]}.safetensors"}
        write_whole(folder / part["weights"], data)
        manifest.pop("reference", None)  # it is of the cascade before
        _put_manifest(folder, manifest | {"stages": [part, *(p for p in manifest["stages"] if p["role"] != "gate")]})


def _manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        sound = as_written(manifest)
    except (ValueError, KeyError, TypeError):
        raise Fatal(f"{file} is not a manifest; give another output folder.") from None
    if not sound:  # writing a new digest would hide the damage
        raise Fatal(f"{file} is not what was written (its SHA-256 differs); give another output folder.")
    return manifest


def _on_disk(value: Tensor) -> Tensor:
    """Matrices in half precision; vectors (batch norm, biases) are small and keep their precision."""
    half = value.is_floating_point() and value.ndim > 1
    return value.detach().to("cpu", torch.float16 if half else value.dtype).contiguous()


def _put(folder: Path, manifest: dict[str, Any], part: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    data = save(tensors)
    part["sha256"] = hashlib.sha256(data).hexdigest()
    weights = folder / f"{part['role']}-{part['sha256'][:12]}.safetensors"
    part["weights"] = weights.name
    write_whole(weights, data)
    stage = _stage(part, weights)
    # What most machines compute: integers differ between engines, other networks take long to convert for OpenVINO.
    engine = open_engine("auto", "cpu") if stage.int8 else TorchEngine("cpu")
    part["check_logits"] = check_logits(stage, engine).round(4).tolist()
    others = [p for p in manifest["stages"] if p["role"] != part["role"]]
    manifest["stages"] = sorted([*others, part], key=lambda p: _ROLES.index(p["role"]))
    _put_manifest(folder, manifest)


def _put_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Make `manifest` the bundle's, with one rename; weights that it no longer names are deleted after it."""
    for stage in manifest["stages"]:
        if "plane" in stage:  # its name before format 4
            stage["model_input"] = stage.pop("plane")
    manifest["format"] = FORMAT
    manifest["sha256"] = manifest_digest(manifest)
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    named = {stage["weights"] for stage in manifest["stages"]}
    for file in folder.glob("*.safetensors"):
        if file.name not in named and file.name.startswith(_ROLES):
            file.unlink()


def _stage(part: dict[str, Any], weights: Path) -> ModelSpec:
    return ModelSpec(
        role=part["role"],
        architecture=part["architecture"],
        channels=part["channels"],
        classes=tuple(part["classes"]),
        model_input=ModelInputSpec(**(part["model_input"] if "model_input" in part else part["plane"])),
        mean=tuple(part["mean"]),
        std=tuple(part["std"]),
        weights=weights,
        sha256=part["sha256"],
        temperature=part["temperature"],
        threshold=part["threshold"],
        ood=None,
        manifest=part,
    )
