"""Model bundles: a manifest, safetensors weights and a card in one folder (docs/bundle-format.md).

Format, hashes and class counts are checked before any weight is used. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.model_spec import ModelSpec, read_stage, refused
from cxrbatch.types import ModelInputSpec

__all__ = [
    "FORMAT",
    "NOT_CALIBRATED",
    "SHIPPED",
    "Bundle",
    "as_written",
    "find_bundle",
    "load_bundle",
    "manifest_digest",
    "shipped_bundles",
]

FORMAT = 5
NOT_CALIBRATED = "nothing yet: run `cxrbatch calibrate`"  # `chosen_on` of a stage as `train` leaves it
_SEALED = 3  # the first format whose manifest carries its own digest
_UNSEAL = 'restore it, or take its top-level "sha256" out and set "format" to 2 if you changed it on purpose'
_EXACT = " exact"
SHIPPED = Path(__file__).parents[1] / "bundles"


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

    @property
    def lacks(self) -> str:
        """A sentence if `calibrate` has not been run since `train`, and otherwise ""."""
        if self.disease.manifest.get("chosen_on") != NOT_CALIBRATED:
            return ""
        return (
            f"The bundle {self.path} was never calibrated: no image counts as unlike its training data, and its "
            f"confidence says little. Run `cxrbatch calibrate {self.path} --data DIR` first."
        )

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
            raise refused(folder, f"it cannot be read ({error.strerror})") from None
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
            raise refused(folder, f"its format {manifest['format']} is newer than this program; upgrade cxrbatch")
        if not as_written(manifest):
            raise refused(folder, f"its manifest.json is not what was written (its SHA-256 differs); {_UNSEAL}")
        for key in ("name", "version"):
            if not isinstance(manifest[key], str) or not manifest[key]:
                raise refused(folder, f"the {key} in its manifest.json is no text")
        stages = tuple(read_stage(folder, part) for part in manifest["stages"])
        bundle = Bundle(
            folder, manifest["name"], manifest["version"], hashlib.sha256(raw).hexdigest(), manifest, stages
        )
        roles = [stage.role for stage in stages]
        if roles not in (["gate", "disease"], ["disease"]):
            raise refused(folder, f"its stages are {roles}, and must be a disease model, or a gate and one")
    except OSError as error:
        raise refused(folder, f"it cannot be read ({error.strerror})") from None
    except RecursionError:
        raise refused(folder, "its manifest.json is nested too deeply") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise refused(folder, f"its manifest.json is not usable ({type(error).__name__}: {error})") from None
    return bundle


def as_written(manifest: dict[str, Any]) -> bool:
    """Whether a manifest matches its own digest; before format 3 it may have none. Raises KeyError."""
    carries = "sha256" in manifest or manifest["format"] >= _SEALED
    return not carries or bool(manifest["sha256"] == manifest_digest(manifest))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without this digest itself; independent of white space and the order of keys."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
