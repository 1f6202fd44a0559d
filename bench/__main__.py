"""`python -m bench`: the rounds, in order. Nothing here is asserted; it prints what it found."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.inputs import KINDS, Kind, make_kind
from bench.report import machine, print_report, write_docs
from bench.subjects import LOOPS, kept_when_killed, run_floor, run_loop, run_scan, second_scan
from bench.watching import watch_latency

_HERE = Path(__file__).parent
_DOCS = _HERE.parent / "docs"
_LONG_KIND, _KILLED_KIND = "jpeg1024", "jpeg2000"
_QUICK_KINDS = "jpeg2000,raw,j2k"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Our scan beside the scripts that people write.")
    parser.add_argument(
        "--quick", action="store_true", help=f"few images of {_QUICK_KINDS}, one round: a minute or two"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--files", type=int, help="images a kind for the scan (the loops get the first fifth)")
    parser.add_argument("--kinds", default="", help=f"of {','.join(kind.name for kind in KINDS)}; all by default")
    parser.add_argument("--long", type=int, default=2_000, help="images of the long run")
    parser.add_argument("--inputs", type=Path, default=_HERE / "inputs", help="where the images are kept between runs")
    parser.add_argument("--libraries", default="", help="a folder of decoders for the loops alone")
    parser.add_argument("--report", type=Path, help="only report on this JSON of an earlier run")
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md and its plot")
    return parser.parse_args()


def main() -> None:
    given = _arguments()
    console = Console(width=None if os.isatty(1) else 140)
    if given.report:
        found = json.loads(given.report.read_text())
    else:
        found = measure(given, console)
        results = _HERE / "results"
        results.mkdir(exist_ok=True)
        (results / "latest.json").write_text(json.dumps(found, indent=1))
    print_report(console, found)
    if given.docs:
        write_docs(_DOCS / "performance.md", found)
    image = _DOCS / "images" / "bench.png" if given.docs else _HERE / "results" / "bench.png"
    try:
        from bench.plot import draw

        draw(found, image)
        console.print(f"plot: {image}", style="dim")
    except ImportError:
        console.print("no plot: it needs matplotlib (pip install '.[bench]')", style="dim")


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All of it, in rounds: in each, everybody runs on one kind after the other."""
    wanted = (given.kinds or (_QUICK_KINDS if given.quick else "")).split(",")
    kinds = [_sized(kind, given) for kind in KINDS if kind.name in wanted or wanted == [""]]
    rounds = 1 if given.quick else given.rounds
    load = os.getloadavg()[0]
    made = {kind.name: make_kind(kind, given.inputs.absolute(), kind.files) for kind in kinds}
    kinds = [kind for kind in kinds if made[kind.name] is not None]
    folders = {name: folder for name, folder in made.items() if folder is not None}
    first = kinds[0]
    found: dict[str, Any] = {"machine": machine(), "rounds": rounds, "start": [], "kinds": {}, "loop_start": {}}
    run_scan(folders[first.name], 1)  # converts the bundle, should this be its first use
    for number in range(rounds):
        starts = sorted((run_scan(folders[first.name], 1) for _ in range(3)), key=lambda one: one["cpu_s"])
        found["start"].append(_without_labels(starts[1]))  # all CPU figures of scans hang on it
        for kind in kinds:
            console.print(f"round {number + 1} of {rounds}: {kind.title}", style="dim")
            found["kinds"].setdefault(kind.name, []).append(_round(kind, folders[kind.name], given.libraries))
    for loop in LOOPS:
        found["loop_start"][loop] = _without_labels(run_loop(loop, folders[first.name], 1, given.libraries))
    if not given.quick:
        _single_runs(given, found, console)
    return found | {"load": [load, os.getloadavg()[0]]}


def _round(kind: Kind, folder: Path, libraries: str) -> dict[str, Any]:
    one: dict[str, Any] = {"scan": run_scan(folder, kind.files), "floor": run_floor(folder, kind.files)}
    for loop in LOOPS:
        one[loop] = run_loop(loop, folder, kind.loop_files, libraries)
    return one


def _single_runs(given: argparse.Namespace, found: dict[str, Any], console: Console) -> None:
    long_kind = next(kind for kind in KINDS if kind.name == _LONG_KIND)
    console.print(f"a long run, {given.long} images", style="dim")
    images = make_kind(long_kind, given.inputs.absolute(), given.long)
    assert images is not None
    found["long"] = {"scan": _without_labels(run_scan(images, given.long)), "floor": run_floor(images, given.long)}
    if _KILLED_KIND in found["kinds"]:
        console.print("kill -9 at half-way", style="dim")
        kind = _sized(next(kind for kind in KINDS if kind.name == _KILLED_KIND), given)
        found["kept"] = kept_when_killed(kind, given.inputs.absolute() / kind.name, given.libraries)
    console.print("a second scan; a watch", style="dim")
    found["again"] = second_scan(100_000)
    with tempfile.TemporaryDirectory(prefix="cxrbench") as place:
        found["watch"] = watch_latency(images, 200, Path(place))


def _sized(kind: Kind, given: argparse.Namespace) -> Kind:
    if given.quick:
        return replace(kind, files=max(10, kind.files // 10), loop_files=max(3, kind.loop_files // 6))
    if given.files:
        return replace(kind, files=given.files, loop_files=max(3, given.files // 5))
    return kind


def _without_labels(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "labels"}


if __name__ == "__main__":
    main()
