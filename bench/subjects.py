"""Who runs in the bench, each as a process of its own on the same images."""

from __future__ import annotations

import csv
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.inputs import Kind, image_paths
from bench.measure import Cost, committed, run_tree, scan_command
from cxrbatch.store.migrate import upgrade

__all__ = ["LOOPS", "kept_when_killed", "run_floor", "run_loop", "run_scan", "second_scan"]

LOOPS = {
    "batch1": "loop, batch 1",
    "loader": "DataLoader, 2 x 32",
    "process": "process_batch shape",
}


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cxrbench") as place:
        yield Path(place)


def _ours(libraries: str = "") -> dict[str, str]:
    """So that `bench` is found from anywhere; `libraries` holds decoders that only the loops use."""
    root = str(Path(__file__).parent.parent)
    return {"PYTHONPATH": ":".join(filter(None, (root, libraries, os.environ.get("PYTHONPATH"))))}


@contextmanager
def _first(folder: Path, files: int) -> Iterator[Path]:
    """A folder with the first `files` images of another one, as hard links."""
    with tempfile.TemporaryDirectory(prefix=".first", dir=folder.parent) as place:
        for path in image_paths(folder, files):
            os.link(path, Path(place) / Path(path).name)
        yield Path(place)


def _described(cost: Cost, files: int) -> dict[str, Any]:
    return {
        "files": files,
        "code": cost.code,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "rss_mib": cost.rss_mib,
        "first_row_s": cost.first_row_s,
        "going": cost.going,
    }


def run_scan(folder: Path, files: int) -> dict[str, Any]:
    """Our scan of the first `files` of a folder into a store that is there and empty, to the CSV."""
    with _place() as place, _first(folder, files) as images:
        upgrade(f"sqlite:///{place}/scan.db")
        command = scan_command(images, place)
        cost = run_tree(command, place, rows=lambda: committed(place / "scan.db"), under_way=max(1, files // 4))
        if cost.code not in (0, 3):
            raise RuntimeError((place / "stderr.txt").read_text())
        with (place / "scan.csv").open(newline="") as file:
            labels = {Path(row["path"]).name: row["label"] for row in csv.DictReader(file)}
    return _described(cost, files) | {"labels": labels}


def run_loop(loop: str, folder: Path, files: int, libraries: str) -> dict[str, Any]:
    """One of the scripts; where it cannot read the images, the last line of why."""
    with _place() as place:
        out = place / "rows.csv"
        command = [sys.executable, "-m", "bench.loops", loop, str(folder), str(files), str(out)]
        cost = run_tree(command, place, env=_ours(libraries), rows=out.exists)
        if cost.code != 0:
            return _described(cost, files) | {"failed": (place / "stderr.txt").read_text().strip().splitlines()[-1]}
        with out.open(newline="") as file:
            labels = {Path(row["path"]).name: row["label"] for row in csv.DictReader(file)}
    return _described(cost, files) | {"labels": labels, "loop_s": cost.out["seconds"], "loop_cpu_s": cost.out["cpu_s"]}


def run_floor(folder: Path, files: int) -> dict[str, Any]:
    """The sum of the stages; see floor.py."""
    with _place() as place:
        cost = run_tree([sys.executable, "-m", "bench.floor", str(folder), str(files)], place, env=_ours())
        if cost.code != 0:
            raise RuntimeError((place / "stderr.txt").read_text())
        return cost.out


def kept_when_killed(kind: Kind, folder: Path, libraries: str) -> dict[str, str]:
    """The rows that each one leaves behind when its group gets kill -9 after half of its images, "n of m"."""
    kept = {}
    with _place() as place, _first(folder, kind.files) as images:
        upgrade(f"sqlite:///{place}/scan.db")
        half = lambda: committed(place / "scan.db") >= kind.files // 2  # noqa: E731
        run_tree(scan_command(images, place), place, kill_when=half)
        kept["scan"] = f"{committed(place / 'scan.db')} of {kind.files}"
    for loop in LOOPS:
        with _place() as place:
            out, images_a_loop = place / "rows.csv", str(kind.loop_files)
            command = [sys.executable, "-m", "bench.loops", loop, str(folder), images_a_loop, str(out)]
            cost = run_tree([*command, str(kind.loop_files // 2)], place, env=_ours(libraries))
            rows = len(out.read_text().splitlines()) - 1 if out.exists() else 0
            kept[loop] = f"{rows} of {images_a_loop}" if cost.code == -signal.SIGKILL else "not killed: it failed"
    return kept


def second_scan(files: int) -> dict[str, float]:
    """Scan a folder of `files` small files that are no images twice; the second time, nothing is opened."""
    with _place() as place:
        folder = place / "in"
        folder.mkdir()
        for i in range(files):
            (folder / f"{i:06}").write_bytes(b"no image %06d" % i)
        command = scan_command(folder, place)[:-2]
        first = run_tree(command, place, env={"CXRBATCH_QUIET_S": "0"})
        again = run_tree(command, place, env={"CXRBATCH_QUIET_S": "0"})
        seconds = float(again.out["seconds"])
    return {"files": files, "first_wall_s": first.wall_s, "wall_s": again.wall_s, "seconds": seconds}
