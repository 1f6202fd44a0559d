"""Small labelled folders made by code: bright discs, dark bars, and whatever a test needs besides."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = """
name = "small"
role = "disease"
architecture = "mobilenet_v2"
channels = 1
batch = 8
seed = 3
model_input = { size = 32 }
[[phases]]
epochs = 2
frozen = 0
[optimiser]
name = "adam"
learning_rate = 1e-3
[augmentation]
kind = "style"
"""


def draw(kind: int, rng: np.random.Generator, side: int = 48) -> np.ndarray:
    """One grey image (side, side) uint8: 0 a bright disc, 1 dark bars, 2 a ramp; with noise."""
    y, x = np.mgrid[0:side, 0:side] / side
    cx, cy = rng.uniform(0.4, 0.6, 2)
    array = [
        60.0 + 150 * (np.hypot(x - cx, y - cy) < 0.25),
        170.0 - 120 * (np.sin(x * 25 + 6 * cx) > 0.3),
        20.0 + 200 * np.clip(x * cx + y * cy, 0, 1),
    ][kind]
    return np.clip(array + rng.normal(0, 8, array.shape), 0, 255).astype(np.uint8)


def make_folder(
    root: Path,
    labels: tuple[str, ...] = ("NORMAL", "SICK"),
    counts: dict[str, int] | None = None,
    manifest: bool = False,
    side: int = 48,
) -> Path:
    """root/<split>/<label>/<n>.png; with `manifest`, two images per patient and two sources per label."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (counts or {"train": 12, "val": 6, "test": 6}).items():
        for kind, label in enumerate(labels):
            folder = root / split / label
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(draw(kind % 3, rng, side)).save(folder / f"{n}.png")
                path = f"{split}/{label}/{n}.png"
                rows.append((path, f"site{n % 2}", f"{split}-{label}-{n // 2}"))
    if manifest:
        with (root / "manifest.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "source", "group"), *rows])
    return root


def write_recipe(file: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    file.write_text(text)
    return file


@contextmanager
def locked_by_another(path: Path) -> Iterator[None]:
    """Another process holds the lock of `path`, and is killed with -9 in the end."""
    code = (
        "import sys; from pathlib import Path; from cxrbatch.training.files import locked\n"
        "with locked(Path(sys.argv[1]), 'busy'): print(flush=True); input()"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield
        other.kill()
