"""Do OpenVINO and PyTorch decide alike? What changes, and CPU time side by side, on this processor.

    python -m bench.engines [BUNDLE] [--shared ../shared] [--split val]

Every image of a split is scored by both networks of a bundle on both engines, in one thread. Each network is exchanged
alone, the other stays OpenVINO's. What changed is decided as a scan decides: label, decision, label set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.bundle import Bundle, ModelSpec, load_bundle
from cxrbatch.inference.cascade import gate_probabilities, ood_scores
from cxrbatch.inference.decision import Assessment, Thresholds
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.engines.protocol import Network
from cxrbatch.inference.engines.torch_engine import TorchEngine
from cxrbatch.training.datasets import find_folders, read_images, split_images
from cxrbatch.training.scores import assess_each, probabilities_of

_TASKS = ("cascade", "siim", "rsna", "web", "gate")
_BATCH = 4

Outputs = tuple[Any, Any]  # logits, features


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("bundle", nargs="?", default="default")
    given.add_argument("--shared", type=Path, default=Path("../shared"))
    given.add_argument("--split", default="val")
    options = given.parse_args()
    folders = find_folders(options.shared / "data", _TASKS)
    images = [image for folder in folders for image in split_images(folder.images, options.split)]
    bundle = load_bundle(options.bundle)
    assert bundle.gate is not None
    torch.set_num_threads(1)
    exact: dict[str, Outputs] = {}
    changed: list[tuple[str, str, Outputs]] = []
    for stage in (bundle.gate, bundle.disease):
        networks = OpenVinoEngine(threads=1).load(stage), TorchEngine("cpu").load(stage)
        (ours, our_ms), (theirs, their_ms) = _side_by_side(*networks, _model_inputs(stage, images))
        exact[stage.role] = ours
        away = np.sqrt(np.mean((ours[0] - theirs[0]) ** 2))
        name = f"CPU ms an image {our_ms:.2f} OpenVINO, {their_ms:.2f} PyTorch; logits differ by {away:.2g} (rms)"
        changed.append((stage.role, name, theirs))
    expected = _assessments(bundle, exact)
    print(f"{len(expected)} images of split {options.split}")
    for role, name, outputs in changed:
        found = _assessments(bundle, exact | {role: outputs})
        pairs = list(zip(expected, found, strict=True))
        flips = {
            "label": sum(a.label != b.label for a, b in pairs),
            "decision": sum(a.decision != b.decision for a, b in pairs),
            "label set": sum(set(a.label_set) != set(b.label_set) for a, b in pairs),
        }
        counts = ", ".join(f"{what} {n} ({n / len(pairs):.2%})" for what, n in flips.items())
        print(f"{role}, {name}: changed: {counts}", flush=True)


def _model_inputs(stage: ModelSpec, images: Any) -> Any:
    return np.stack(
        [fit_model_input(grey, stage.model_input) for grey in read_images(images, stage.model_input.size)[1]]
    )


def _side_by_side(one: Network, other: Network, inputs: Any) -> list[tuple[Outputs, float]]:
    """Outputs and CPU ms an image of each, batch by batch in turn: the machine's speed changes."""
    answers: list[list[list[Any]]] = [[], []]
    cost = [0.0, 0.0]
    for start in range(0, len(inputs), _BATCH):
        x = np.ascontiguousarray(inputs[start : start + _BATCH])
        for which, network in enumerate((one, other)):
            began = time.process_time()
            answers[which].append(network(x))
            cost[which] += time.process_time() - began
    return [
        ((np.concatenate([a[0] for a in each]), np.concatenate([a[1] for a in each])), 1e3 * seconds / len(inputs))
        for each, seconds in zip(answers, cost, strict=True)
    ]


def _assessments(bundle: Bundle, outputs: dict[str, Outputs]) -> tuple[Assessment, ...]:
    gate, disease = bundle.gate, bundle.disease
    assert gate is not None and disease.ood is not None
    chest = gate_probabilities(outputs["gate"][0], gate.temperature)
    logits, features = outputs["disease"]
    return assess_each(
        Thresholds.of(bundle),
        chest[:, 0],
        probabilities_of(logits.astype(np.float64), disease.temperature),
        ood_scores(features, disease.ood),
        [()] * len(logits),
        chest[:, 1],
    )


if __name__ == "__main__":
    main()
