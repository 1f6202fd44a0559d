"""What people write today, with this project's weights in plain PyTorch: `python -m bench.loops LOOP FOLDER N OUT.csv`.

All three hold every row until the end, and read an image with the libraries that are usual for it: Pillow for JPEG
and PNG, pydicom with whatever plug-ins are installed for DICOM. Prints one line of JSON about itself.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from bench.inputs import image_paths
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines.networks import build_network, load_state
from cxrbatch.inference.model_spec import ModelSpec

BUNDLE = load_bundle("default")
Row = tuple[str, str, float]  # path, label, probability of being a chest image


def read_image(path: str) -> NDArray[Any]:
    """The whole image, grey, 0..255: the way of pydicom's documentation, modality and VOI over all pixels."""
    if not path.endswith(".dcm"):
        return np.asarray(Image.open(path).convert("L"))
    dataset = pydicom.dcmread(path)
    pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = 2**dataset.BitsStored - 1 - pixels
    if "WindowWidth" in dataset:
        windowed: NDArray[np.uint8] = (pixels * (255 / (2**dataset.BitsStored - 1))).astype(np.uint8)
        return windowed
    pixels -= pixels.min()
    grey: NDArray[np.uint8] = (pixels * (255 / max(float(pixels.max()), 1.0))).astype(np.uint8)
    return grey


def padded(image: NDArray[Any], stage: ModelSpec) -> Tensor:
    """Resized to the stage's square with black borders, normalised: (1, size, size) float32."""
    size = stage.model_input.size
    square = ImageOps.pad(Image.fromarray(image), (size, size), Image.Resampling.BILINEAR)
    model_input = torch.from_numpy(np.asarray(square, np.float32) / 255)
    return (model_input[None] - stage.mean[0]) / stage.std[0]


def cropped(image: NDArray[Any], stage: ModelSpec) -> Tensor:
    """The shape of torchxrayvision's scripts: whole image to [-1024, 1024], centre square, resized as float."""
    scaled = (2 * image.astype(np.float32) / 255 - 1) * 1024
    rows, columns = scaled.shape
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    square = torch.from_numpy(np.ascontiguousarray(scaled[top : top + side, left : left + side]))[None, None]
    size = stage.model_input.size
    model_input = interpolate(square, (size, size), mode="bilinear", antialias=True)[0]
    return ((model_input / 1024 + 1) / 2 - stage.mean[0]) / stage.std[0]


class Networks:
    """Gate, then disease model, as they come out of torchvision: eager, float32, nothing folded."""

    def __init__(self) -> None:
        assert BUNDLE.gate is not None
        self.gate, self.disease = self._load(BUNDLE.gate), self._load(BUNDLE.disease)

    @staticmethod
    def _load(stage: ModelSpec) -> nn.Module:
        net = build_network(stage.architecture, stage.channels, len(stage.classes))
        state = {k.removeprefix("network."): v for k, v in load_file(stage.weights).items() if k.startswith("network.")}
        load_state(net, state)
        return net.eval()

    @torch.no_grad()
    def __call__(self, small: Tensor, large: Tensor) -> list[tuple[str, float]]:
        """Batches (n, 1, size, size) for gate and disease model -> label and chest probability of each."""
        assert BUNDLE.gate is not None
        chest = torch.sigmoid(self.gate(small)[0][:, 0] / BUNDLE.gate.temperature)
        passed = (chest >= BUNDLE.gate.threshold).nonzero()[:, 0]
        labels = ["NOT_CHEST"] * len(chest)
        if len(passed):
            probabilities = torch.softmax(self.disease(large[passed])[0] / BUNDLE.disease.temperature, 1)
            for i, best in zip(passed.tolist(), probabilities.argmax(1).tolist(), strict=True):
                labels[i] = BUNDLE.disease.classes[best]
        return list(zip(labels, chest.tolist(), strict=True))


class Images(Dataset[tuple[str, Tensor, Tensor]]):
    """What a DataLoader's workers read."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor]:
        assert BUNDLE.gate is not None
        image = read_image(self.paths[i])
        return self.paths[i], padded(image, BUNDLE.gate), padded(image, BUNDLE.disease)


def one_by_one(paths: list[str], networks: Networks, shape: Any) -> Iterator[Row]:
    assert BUNDLE.gate is not None
    for path in paths:
        image = read_image(path)
        [(label, chest)] = networks(shape(image, BUNDLE.gate)[None], shape(image, BUNDLE.disease)[None])
        yield path, label, chest


def by_loader(paths: list[str], networks: Networks) -> Iterator[Row]:
    for some, small, large in DataLoader(Images(paths), batch_size=32, num_workers=2):
        for path, (label, chest) in zip(some, networks(small, large), strict=True):
            yield path, label, chest


def _cpu_s() -> float:
    """User and system seconds of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    loop, folder, files, out, *killed_after = sys.argv[1:]
    paths = list(image_paths(Path(folder), int(files)))
    networks = Networks()
    started, cpu_before = time.perf_counter(), _cpu_s()
    if loop == "loader":
        found = by_loader(paths, networks)
    else:
        found = one_by_one(paths, networks, padded if loop == "batch1" else cropped)
    rows = []
    for row in found:
        rows.append(row)
        if killed_after and len(rows) == int(killed_after[0]):
            os.killpg(0, signal.SIGKILL)
    seconds, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_before
    with Path(out).open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "gate_probability"), *rows])
    print(json.dumps({"files": len(rows), "seconds": seconds, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main()
