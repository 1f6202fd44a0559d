"""Bundles made by code, for tests that need a bundle but not a trained one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cxrbatch.inference.engines.networks import build_network


def make_bundle(
    folder: Path,
    *,
    size: int = 64,
    with_gate: bool = True,
    gate_bias: float = 10.0,
    architecture: str = "mobilenet_v2",
    frontal_bias: float | None = None,
) -> Path:
    """A cascade of untrained networks. With `gate_bias` of 10 everything passes the gate, with -10 nothing does.

    With `frontal_bias` the gate has a second output, which says so of every image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = []
    gate = ["CHEST"] if frontal_bias is None else ["CHEST", "FRONTAL"]
    for role, classes in (("gate", gate), ("disease", ["NORMAL", "COVID19", "PNEUMONIA", "TUBERCULOSIS"])):
        if role == "gate" and not with_gate:
            continue
        torch.manual_seed(0)
        net = build_network(architecture, 1, len(classes))
        if role == "gate":
            torch.nn.init.zeros_(net.classifier[1].weight)
            torch.nn.init.constant_(net.classifier[1].bias, gate_bias)
            if frontal_bias is not None:
                torch.nn.init.constant_(net.classifier[1].bias[1:], frontal_bias)
        stages.append(write_stage(folder, role, classes, size, net.state_dict(), architecture))
    if with_gate and frontal_bias is not None:
        stages[0]["frontal_threshold"] = 0.5
    manifest = {"format": 2, "name": "test", "version": "0", "licence": "", "intended_use": "", "stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_stage(
    folder: Path,
    role: str,
    classes: list[str],
    size: int,
    state: dict[str, torch.Tensor],
    architecture: str = "mobilenet_v2",
) -> dict[str, Any]:
    weights = folder / f"{role}.safetensors"
    save_file({f"network.{key}": value.contiguous() for key, value in state.items()}, weights)
    return {
        "role": role,
        "architecture": architecture,
        "channels": 1,
        "classes": classes,
        "model_input": {"size": size, "fit": "pad", "interpolation": "bilinear"},
        "mean": [0.5],
        "std": [0.5],
        "weights": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "temperature": 1.0,
        "threshold": 0.5,
        "chosen_on": "nothing",
    }
