"""What cheap decode changes: every film read both ways, through the product's own decoder and cascade.

    python -m bench.flips [--shared ../shared] [--cascade default] [--films 200]

Three kinds of input: the labelled pictures of SHARED/data, the DICOM files of SHARED/dicom, and test films of
SHARED/data enlarged (Lanczos, with a little grain) to the sizes of clinical films and written in memory in several
formats, because the pictures themselves are too small to be shrunk. Prints one row a format, and every flip; Ctrl-C
prints what there is so far.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, HTJ2KLossless, JPEG2000Lossless, JPEGBaseline8Bit

from cxrbatch.bundles import Bundle, load_bundle
from cxrbatch.cascade import Cascade
from cxrbatch.decode import Identifiers, Limits, decode_bytes
from cxrbatch.engines import open_engine
from cxrbatch.errors import Rejected
from cxrbatch.nouns import DecodedImage, Verdict
from cxrbatch.samples.dicom import as_dicom, write_dicom

_WINDOW: dict[str, Any] = {"WindowCenter": "2048", "WindowWidth": "3700"}
_GRAIN = 0.004  # standard deviation, of the full range
_BATCH = 8

Both = tuple[DecodedImage | Rejected, DecodedImage | Rejected]  # exact, cheap


def enlarged(film: Path, rows: int, columns: int, bits: int) -> Any:
    """A film at another size, its aspect kept on black, 8 bits of grey spread over `bits`."""
    with Image.open(film) as image:
        grey = image.convert("L").convert("F")
    scale = min(rows / grey.height, columns / grey.width)
    grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
    sheet = np.zeros((rows, columns), np.float32)
    sheet[: grey.height, : grey.width] = np.asarray(grey) / 255
    seed = int.from_bytes(film.name.encode()[-8:], "little")
    sheet = 0.03 + 0.92 * sheet + np.random.default_rng(seed).normal(0, _GRAIN, sheet.shape).astype(np.float32)
    top = 2**bits - 1
    return np.clip(np.rint(sheet * top), 0, top).astype(np.uint8 if bits == 8 else np.uint16)


def as_file(grey: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, kind, **options)
    return buffer.getvalue()


def in_formats(film: Path) -> Iterator[tuple[str, bytes]]:
    """One film in every format that is shrunk in a way of its own."""
    square = enlarged(film, 2000, 2000, 8)
    yield "JPEG 2000 px", as_file(square, "JPEG", quality=90)
    yield "JPEG 2000 px, colour", as_file(np.stack([square] * 3, -1), "JPEG", quality=90)
    yield "PNG 1024 px", as_file(enlarged(film, 1024, 1024, 8), "PNG", compress_level=1)
    deep = enlarged(film, 2500, 2048, 12)
    yield "DICOM raw 2048 x 2500, window", write_dicom(as_dicom(deep, ExplicitVRLittleEndian, bits=12, **_WINDOW))
    yield "DICOM raw 2048 x 2500, percentiles", write_dicom(as_dicom(deep, ExplicitVRLittleEndian, bits=12))
    yield "DICOM J2K 2048 x 2500, window", write_dicom(as_dicom(deep, JPEG2000Lossless, bits=12, **_WINDOW))
    yield "DICOM HTJ2K 2048 x 2500, percentiles", write_dicom(as_dicom(deep, HTJ2KLossless, bits=12))
    yield "DICOM JPEG 2048 x 2500", write_dicom(as_dicom((deep >> 4).astype(np.uint8), JPEGBaseline8Bit))


def as_it_is(group: str, path: Path) -> Iterator[tuple[str, bytes]]:
    yield group, path.read_bytes()


def read_both(job: tuple[Callable[[Path], Iterable[tuple[str, bytes]]], Path, Bundle]) -> list[tuple[str, str, Both]]:
    """(format, file name, the picture read exactly and cheaply) of all that one film is made into."""
    make, path, bundle = job

    def read(data: bytes, exact: bool) -> DecodedImage | Rejected:
        try:
            return decode_bytes(data, bundle.plane_specs, Limits(), Identifiers(mode="drop"), exact)
        except Rejected as problem:
            return problem

    return [(kind, path.name, (read(data, True), read(data, False))) for kind, data in make(path)]


def chances(verdict: Verdict) -> dict[str, float]:
    gate = {} if verdict.gate_probability is None else {"gate": verdict.gate_probability}
    return gate | verdict.probabilities


def nearness(verdict: Verdict, bundle: Bundle) -> str:
    """How near an exact verdict was to another one."""
    parts = []
    if verdict.gate_probability is not None and bundle.gate is not None:
        parts.append(f"gate {verdict.gate_probability:.3f} (threshold {bundle.gate.threshold:.3f})")
    ranked = sorted(verdict.probabilities.items(), key=lambda item: -item[1])[:2]
    parts += [f"{label} {p:.3f}" for label, p in ranked]
    parts.append(f"review below {bundle.disease.threshold:.3f}")
    if verdict.ood_score is not None:
        parts.append(f"ood {verdict.ood_score:.3f} (limit 1)")
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


def compare(batch: list[tuple[str, str, Both]], cascade: Cascade, rows: dict[str, Row], flips: list[str]) -> None:
    """Score a batch both ways and enter it in `rows`; equal planes are equal verdicts and are not scored."""
    different = []
    for kind, name, (exact, cheap) in batch:
        row = rows[kind]
        row.count["files"] += 1
        if isinstance(exact, Rejected) or isinstance(cheap, Rejected):
            if str(exact) != str(cheap):
                row.count["label"] += 1
                flips.append(f"- {kind}, {name}: exact {exact}, cheap {cheap}")
            continue
        grey = max(int(np.abs(p.astype(int) - cheap.planes[s]).max()) for s, p in exact.planes.items())
        row.grey = max(row.grey, grey)
        row.count["shrunk"] += grey > 0
        if grey or exact.facts.quality_flags != cheap.facts.quality_flags:
            different.append((kind, name, exact, cheap))
        else:
            row.deltas.append(0.0)
    if not different:
        return
    both = [cascade.score([pair[2] for pair in different]), cascade.score([pair[3] for pair in different])]
    for (kind, name, _, _), exact_said, cheap_said in zip(different, *both, strict=True):
        assert isinstance(exact_said, Verdict) and isinstance(cheap_said, Verdict), (exact_said, cheap_said)
        a, b = chances(exact_said), chances(cheap_said)
        rows[kind].deltas.append(max(abs(a[key] - b[key]) for key in a.keys() & b.keys()))
        for what in ("label", "decision"):
            old, new = (str(getattr(said, what)) for said in (exact_said, cheap_said))
            if old != new:
                rows[kind].count[what] += 1
                flips.append(f"- {kind}, {name}: {what} {old} -> {new}; exact: {nearness(exact_said, cascade.bundle)}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--shared", type=Path, default=Path("../shared"))
    arguments.add_argument("--cascade", default="default")
    arguments.add_argument("--films", type=int, default=200, help="test films to enlarge")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--only", choices=["data", "dicom", "enlarged"], help="one kind of input")
    given = arguments.parse_args()
    bundle = load_bundle(given.cascade)
    data, dicom = given.shared / "data", given.shared / "dicom"
    jobs: list[Any] = []
    if given.only in (None, "enlarged"):
        films = sorted(path for task in ("cascade", "external") for path in data.glob(f"{task}/test/*/*"))
        chosen = films[:: max(1, len(films) // given.films)][: given.films]
        jobs += [(in_formats, path, bundle) for path in chosen]
    if given.only in (None, "dicom"):
        jobs += [(partial(as_it_is, "../shared/dicom"), p, bundle) for p in sorted(dicom.rglob("*")) if p.is_file()]
    if given.only in (None, "data"):
        pictures = [p for p in sorted(data.glob("*/*/*/*")) if p.is_file()]
        jobs += [(partial(as_it_is, f"../shared/data/{p.relative_to(data).parts[0]}"), p, bundle) for p in pictures]
    cascade = Cascade(bundle, open_engine("auto", "cpu", bundle))
    rows: dict[str, Row] = defaultdict(Row)
    flips: list[str] = []
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        read = itertools.chain.from_iterable(pool.imap(read_both, jobs, chunksize=1 if given.only != "data" else 16))
        try:
            while batch := list(itertools.islice(read, _BATCH)):
                compare(batch, cascade, rows, flips)
        except KeyboardInterrupt:
            print("Stopped; so far:")
    print(f"{bundle.name} {bundle.version} {bundle.manifest_sha256[:12]}, {cascade.engine.name}\n")
    print("| input | files | planes differ | label flips | decision flips | max Δp | p99 Δp | max grey levels |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, row in rows.items():
        print(row.line(kind))
    enlarged_files = sum(r.count["shrunk"] for r in rows.values())
    flipped = sum(r.count["label"] for r in rows.values())
    print(f"\n{flipped} label flip(s) in {enlarged_files} pictures that differ at all.")
    print("\n".join(flips))


if __name__ == "__main__":
    main()
