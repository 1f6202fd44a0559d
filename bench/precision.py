"""Would fewer bits do? What changes against float32, and CPU time side by side, on this processor.

    python -m bench.precision [--shared ../shared] [--split val]          (int8 too after `pip install nncf`)

Every image of a split is scored by both networks of `default` in float32, in bfloat16 and with the first blocks in
float32 and the others in bfloat16; in eight bits with NNCF, calibrated on training images. Each network is lowered
alone, the other stays in float32. What changed is decided as a scan decides: label, decision, label set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset8 as ops

from cxrbatch.imaging.normalize import fit_model_input
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.cascade import gate_probabilities, ood_scores
from cxrbatch.inference.decision import Assessment, Thresholds
from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.datasets import find_folders, read_images, split_images
from cxrbatch.training.scores import assess_each, probabilities_of

_TASKS = ("cascade", "siim", "rsna", "web", "gate")
_BATCH = 4
_ALL_BLOCKS = 19
_BLOCKS = (2, 4, 7)  # that stay in float32

Network = Callable[[Any], list[Any]]
Outputs = tuple[Any, Any]  # logits, features


class Precision(NamedTuple):
    name: str
    network: Network


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--shared", type=Path, default=Path("../shared"))
    given.add_argument("--split", default="val")
    options = given.parse_args()
    folders = find_folders(options.shared / "data", _TASKS)
    images = [image for folder in folders for image in split_images(folder.images, options.split)]
    train = split_images(next(f for f in folders if f.path.name == "cascade").images, "train")[::40]
    bundle = load_bundle("default")
    assert bundle.gate is not None
    exact: dict[str, Outputs] = {}
    changed: list[tuple[str, str, Outputs]] = []
    for stage in (bundle.gate, bundle.disease):
        inputs, calibration = _model_inputs(stage, images), _model_inputs(stage, train)
        reference, *others = list(_precisions(stage, calibration))
        for precision in others:
            (full, full_ms), (less, less_ms) = _side_by_side(reference.network, precision.network, inputs)
            exact[stage.role] = full
            name = f"{precision.name}; CPU ms an image {full_ms:.2f} float32, {less_ms:.2f}"
            changed.append((stage.role, name, less))
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


def _precisions(stage: ModelSpec, calibration: Any) -> Iterator[Precision]:
    """float32 first."""
    model = OpenVinoEngine(threads=1)._model(stage)
    yield Precision("float32", _in_turn((model, "f32")))
    yield Precision("bfloat16", _in_turn((model, "bf16")))
    for blocks in _BLOCKS:
        first, rest = _cut(model, blocks)
        name = f"{blocks} blocks float32, {_ALL_BLOCKS - blocks} bfloat16"
        yield Precision(name, _in_turn((first, "f32"), (rest, "bf16")))
    if find_spec("nncf"):
        import nncf

        small = nncf.quantize(
            model,
            nncf.Dataset([model_input[None, None] for model_input in calibration]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )
        yield Precision("int8", _in_turn((small, "f32")))


def _cut(model: Any, blocks: int) -> tuple[Any, Any]:
    """A MobileNetV2 graph in two: its first feature blocks, and all that follows."""
    first, rest = model.clone(), model.clone()
    ends = []
    for graph in (first, rest):
        convolutions = [op for op in graph.get_ordered_ops() if op.get_type_name().endswith("Convolution")]
        ends.append(
            convolutions[3 * (blocks - 1)].input_value(0)
        )  # the first block has two, the stem one, others three
    between = ops.parameter(ends[1].get_partial_shape(), np.float32, name="between")
    for reader in list(ends[1].get_target_inputs()):
        reader.replace_source_output(between.output(0))
    return (
        openvino.Model([ends[0]], first.get_parameters(), "first"),
        openvino.Model([r.input_value(0) for r in rest.get_results()], [between], "rest"),
    )


def _in_turn(*parts: tuple[Any, str]) -> Network:
    settings = {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    requests = [
        core.compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
        for model, hint in parts
    ]

    def run(x: Any) -> list[Any]:
        for request in requests:
            request.infer({0: x})
            x = request.get_output_tensor(0).data
        return [requests[-1].get_output_tensor(i).data.copy() for i in (0, 1)]

    return run


def _side_by_side(one: Network, other: Network, inputs: Any) -> list[tuple[Outputs, float]]:
    """Outputs and CPU ms an image of each, batch by batch in turn: the machine's speed changes."""
    answers: list[list[list[Any]]] = [[], []]
    cost = [0.0, 0.0]
    for start in range(0, len(inputs), _BATCH):
        x = np.ascontiguousarray(inputs[start : start + _BATCH, None])
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
