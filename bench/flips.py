"""What cheap decode changes: every image read both ways, through the product's own decoder and cascade.

    python -m bench.flips [--shared ../shared] [--cascade default] [--images 200] [--workers 1]

Three kinds of input: the DICOM files of SHARED/dicom, the images of SHARED/data, and test images of SHARED/data
enlarged (Lanczos, with a little grain) to the sizes of clinical images and written in memory in several formats,
because the images themselves are too small to be shrunk. Only what comes out differently is scored. A row is
printed once its kind is done, every flip at the end; Ctrl-C or a kill prints what there is so far.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, HTJ2KLossless, JPEG2000Lossless, JPEGBaseline8Bit

from cxrbatch.errors import Rejected
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.inference.cascade import Cascade
from cxrbatch.inference.engines import open_engine
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.types import DecodedImage, ModelInputSpec, Prediction

_WINDOW: dict[str, Any] = {"WindowCenter": "2048", "WindowWidth": "3700"}
_GRAIN = 0.004  # standard deviation, of the full range

#: An image -> (format, bytes) of all that it is made into.
Make = Callable[[Path], Iterable[tuple[str, bytes]]]


@dataclass(frozen=True)
class Looked:
    """One file read both ways."""

    kind: str
    name: str
    grey: int = 0  # levels by which the model inputs differ at most
    both: tuple[DecodedImage, DecodedImage] | None = None  # exact, cheap: where anything differs
    refused: tuple[str, str] | None = None  # exact, cheap: where either was


def enlarged(path: Path, rows: int, columns: int, bits: int) -> Any:
    """An image at another size, its aspect kept on black, 8 bits of grey spread over `bits`."""
    with Image.open(path) as image:
        grey = image.convert("L").convert("F")
    scale = min(rows / grey.height, columns / grey.width)
    grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
    sheet = np.zeros((rows, columns), np.float32)
    sheet[: grey.height, : grey.width] = np.asarray(grey) / 255
    seed = int.from_bytes(path.name.encode()[-8:], "little")
    sheet = 0.03 + 0.92 * sheet + np.random.default_rng(seed).normal(0, _GRAIN, sheet.shape).astype(np.float32)
    top = 2**bits - 1
    return np.clip(np.rint(sheet * top), 0, top).astype(np.uint8 if bits == 8 else np.uint16)


def as_file(grey: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, kind, **options)
    return buffer.getvalue()


def in_formats(image: Path) -> Iterator[tuple[str, bytes]]:
    """One image in every format that is shrunk in a way of its own."""
    square = enlarged(image, 2000, 2000, 8)
    yield "JPEG 2000 px", as_file(square, "JPEG", quality=90)
    yield "JPEG 2000 px, colour", as_file(np.stack([square] * 3, -1), "JPEG", quality=90)
    yield "PNG 1024 px", as_file(enlarged(image, 1024, 1024, 8), "PNG", compress_level=1)
    deep = enlarged(image, 2500, 2048, 12)
    yield "DICOM raw 2048 x 2500, window", write_dicom(as_dicom(deep, ExplicitVRLittleEndian, bits=12, **_WINDOW))
    yield "DICOM raw 2048 x 2500, percentiles", write_dicom(as_dicom(deep, ExplicitVRLittleEndian, bits=12))
    yield "DICOM J2K 2048 x 2500, window", write_dicom(as_dicom(deep, JPEG2000Lossless, bits=12, **_WINDOW))
    yield "DICOM HTJ2K 2048 x 2500, percentiles", write_dicom(as_dicom(deep, HTJ2KLossless, bits=12))
    yield "DICOM JPEG 2048 x 2500", write_dicom(as_dicom((deep >> 4).astype(np.uint8), JPEGBaseline8Bit))


def as_it_is(group: str, path: Path) -> Iterator[tuple[str, bytes]]:
    yield group, path.read_bytes()


def read_both(make: Make, specs: tuple[ModelInputSpec, ...], path: Path) -> list[Looked]:
    """All that one image is made into, read exactly and cheaply; the images only where they differ."""

    def read(data: bytes, exact: bool) -> DecodedImage | Rejected:
        try:
            return decode_bytes(data, specs, Limits(), Identifiers(mode="drop"), exact)
        except Rejected as problem:
            return problem

    def look(kind: str, data: bytes) -> Looked:
        exact, cheap = read(data, True), read(data, False)
        if isinstance(exact, Rejected) or isinstance(cheap, Rejected):
            said = [str(one) if isinstance(one, Rejected) else "an image" for one in (exact, cheap)]
            return Looked(kind, path.name, refused=(said[0], said[1]))
        grey = max(
            int(np.abs(model_input.astype(int) - cheap.model_inputs[s]).max())
            for s, model_input in exact.model_inputs.items()
        )
        differs = grey or exact.facts.quality_flags != cheap.facts.quality_flags
        return Looked(kind, path.name, grey, (exact, cheap) if differs else None)

    return [look(kind, data) for kind, data in make(path)]


def chances(prediction: Prediction) -> dict[str, float]:
    gate = {} if prediction.gate_probability is None else {"gate": prediction.gate_probability}
    return gate | prediction.probabilities


def nearness(prediction: Prediction, bundle: Bundle) -> str:
    """How near an exact prediction was to another one."""
    parts = []
    if prediction.gate_probability is not None and bundle.gate is not None:
        parts.append(f"gate {prediction.gate_probability:.3f} (threshold {bundle.gate.threshold:.3f})")
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:2]
    parts += [f"{label} {p:.3f}" for label, p in ranked]
    parts.append(f"review below {bundle.disease.threshold:.3f}")
    if prediction.ood_score is not None:
        parts.append(f"ood {prediction.ood_score:.3f} (limit 1)")
    return ", ".join(parts)


class Row:
    """What one format came to."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.grey = 0  # levels
        self.deltas: list[float] = []

    def line(self, name: str) -> str:
        c, d = self.count, self.deltas or [0.0]
        return (
            f"| {name} | {c['files']} | {c['shrunk']} | {c['label']} | {c['decision']} | {max(d):.4f} "
            f"| {np.percentile(d, 99):.4f} | {self.grey} |"
        )


@dataclass
class Found:
    """All that has been found so far."""

    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    flips: list[str] = field(default_factory=list)
    printed: set[str] = field(default_factory=set)

    def print_rows(self) -> None:
        """The rows that have not been printed yet."""
        for kind, row in self.rows.items():
            if kind not in self.printed:
                self.printed.add(kind)
                print(row.line(kind), flush=True)

    def print_end(self) -> None:
        differ, flipped = (sum(row.count[what] for row in self.rows.values()) for what in ("shrunk", "label"))
        print(f"\n{flipped} label flip(s) in {differ} images that differ at all.")
        print("\n".join(self.flips), flush=True)


def enter(looked: list[Looked], cascade: Cascade, found: Found) -> None:
    """Score both ways what differs, and enter all of it; equal model inputs are equal predictions."""
    for one in looked:
        row = found.rows[one.kind]
        row.count["files"] += 1
        row.grey = max(row.grey, one.grey)
        row.count["shrunk"] += one.grey > 0
        if one.refused and one.refused[0] != one.refused[1]:
            row.count["label"] += 1
            found.flips.append(f"- {one.kind}, {one.name}: exact {one.refused[0]}, cheap {one.refused[1]}")
        elif not one.refused and not one.both:
            row.deltas.append(0.0)
    different = [(one, *one.both) for one in looked if one.both]
    if not different:
        return
    both = [cascade.score([pair[1] for pair in different]), cascade.score([pair[2] for pair in different])]
    for (one, _, _), exact_said, cheap_said in zip(different, *both, strict=True):
        assert isinstance(exact_said, Prediction) and isinstance(cheap_said, Prediction), (exact_said, cheap_said)
        row = found.rows[one.kind]
        a, b = chances(exact_said), chances(cheap_said)
        row.deltas.append(max(abs(a[key] - b[key]) for key in a.keys() & b.keys()))
        for what in ("label", "decision"):
            old, new = (str(getattr(said, what)) for said in (exact_said, cheap_said))
            if old != new:
                row.count[what] += 1
                near = nearness(exact_said, cascade.bundle)
                found.flips.append(f"- {one.kind}, {one.name}: {what} {old} -> {new}; exact: {near}")


def inputs(shared: Path, images: int, only: str | None) -> Iterator[tuple[Make, list[Path]]]:
    """What is read, and how each file is made into others: one kind after the other."""
    data = shared / "data"
    if only in (None, "dicom"):
        yield partial(as_it_is, "../shared/dicom"), sorted(p for p in (shared / "dicom").rglob("*") if p.is_file())
    if only in (None, "data"):
        for task in sorted(p for p in data.iterdir() if p.is_dir()):
            arrays = sorted(p for p in task.glob("*/*/*") if p.is_file())
            yield partial(as_it_is, f"../shared/data/{task.name}"), arrays
    if only in (None, "enlarged"):
        tests = sorted(path for task in ("cascade", "external") for path in data.glob(f"{task}/test/*/*"))
        chosen = tests[:: max(1, len(tests) // images)][:images]
        random.Random(0).shuffle(chosen)  # so that a part of them, when time is short, is a sample too
        yield in_formats, chosen


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a pool ends its workers


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--shared", type=Path, default=Path("../shared"))
    arguments.add_argument("--cascade", default="default")
    arguments.add_argument("--images", type=int, default=200, help="test images to enlarge")
    arguments.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; one a core")
    arguments.add_argument("--only", choices=["data", "dicom", "enlarged"], help="one kind of input")
    given = arguments.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell's job in the background would ignore the first
        signal.signal(signum, signal.default_int_handler)
    bundle = load_bundle(given.cascade)
    cascade = Cascade(bundle, open_engine("auto", "cpu", bundle))
    found = Found()
    print(f"{bundle.name} {bundle.version} {bundle.manifest_sha256[:12]}, {cascade.engine.name}\n")
    print("| input | files | model inputs differ | label flips | decision flips | max Δp | p99 Δp | max grey levels |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    spawn = multiprocessing.get_context("spawn")
    try:
        with spawn.Pool(given.workers, _leave_ctrl_c_to_the_parent) as pool:
            for make, paths in inputs(given.shared, given.images, given.only):
                chunks = 1 if make is in_formats else 16
                read = pool.imap(partial(read_both, make, bundle.input_specs), paths, chunksize=chunks)
                for done, looked in enumerate(read, 1):
                    enter(looked, cascade, found)
                    if done % 20 == 0 and sys.stderr.isatty():
                        print(f"{done} of {len(paths)} ", end="\r", file=sys.stderr, flush=True)
                found.print_rows()
    except KeyboardInterrupt:
        found.print_rows()
        print("Stopped: the last rows are not whole.")
    found.print_end()


if __name__ == "__main__":
    main()
