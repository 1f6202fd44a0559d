"""The sum of the stages that nobody can leave out, each in a tight loop in as many processes as there are cores.

`python -m bench.floor FOLDER N`: read + SHA-256 + decode + normalise, the networks at the batch that is best for
them, the rows into a store; nothing between them. Prints the CPU and the wall seconds of each stage as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.inputs import image_paths

_BATCHES = (1, 4, 8, 16, 32)


def _share(number: int, of: int, folder: str, files: int, barrier: Any, answers: Any) -> None:
    from cxrbatch.deidentify import Identifiers
    from cxrbatch.imaging.decode import decode_file
    from cxrbatch.imaging.limits import Limits
    from cxrbatch.inference.bundle import load_bundle
    from cxrbatch.inference.cascade import Cascade
    from cxrbatch.inference.engines.openvino_engine import OpenVinoEngine
    from cxrbatch.ops.setup import identity_of
    from cxrbatch.store import Store
    from cxrbatch.types import DecodedImage, FoundFile, Outcome

    bundle = load_bundle("default")
    cascade = Cascade(bundle, OpenVinoEngine(threads=1))
    mine = [(path, os.stat(path)) for path in list(image_paths(Path(folder), files))[number::of]]
    found = [FoundFile(path, info.st_size, info.st_mtime_ns, info.st_ino) for path, info in mine]
    limits, identifiers = Limits(), Identifiers(mode="drop")
    specs = bundle.input_specs
    costs: dict[str, tuple[float, float]] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        barrier.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        costs[stage] = time.perf_counter() - wall, time.process_time() - cpu
        return result

    def decode() -> list[DecodedImage]:
        return [decode_file(f.path, f.size, f.mtime_ns, specs, limits, identifiers) for f in found]

    images = timed("decode", decode)
    speeds = {}
    for batch in _BATCHES:
        some = (images * 32)[: max(batch, 16)]
        cascade.score(some[:batch])
        cpu = time.process_time()
        for i in range(0, len(some), batch):
            cascade.score(some[i : i + batch])
        speeds[(time.process_time() - cpu) / len(some)] = batch
    best = speeds[min(speeds)]
    predictions = timed(
        "networks", lambda: [v for i in range(0, len(images), best) for v in cascade.score(images[i : i + best])]
    )
    outcomes = [Outcome(f, image, prediction) for f, image, prediction in zip(found, images, predictions, strict=True)]
    with tempfile.TemporaryDirectory() as place, Store.open(f"sqlite:///{place}/floor.db") as store:
        run = store.begin_run("{}", identity_of(bundle, exact=False), device="cpu", engine="", host="", version="")

        def record() -> None:
            for i in range(0, len(outcomes), 256):
                store.record(run.run_id, run.cascade_id, outcomes[i : i + 256])

        timed("record", record)
    answers.put((best, costs))


def main() -> None:
    folder, files = sys.argv[1], int(sys.argv[2])
    spawn = multiprocessing.get_context("spawn")
    cores = os.cpu_count() or 1
    barrier, answers = spawn.Barrier(cores), spawn.Queue()
    shares = [spawn.Process(target=_share, args=(i, cores, folder, files, barrier, answers)) for i in range(cores)]
    for process in shares:
        process.start()
    reports: list[Any] = []
    while len(reports) < cores:
        try:
            reports.append(answers.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in shares):  # the other one waits for it for ever
                for process in shares:
                    process.kill()
                sys.exit("a share of the work failed, see above")
    for process in shares:
        process.join()
    stages = reports[0][1].keys()
    print(
        json.dumps(
            {
                "files": files,
                "batch": reports[0][0],
                "wall_s": {stage: max(costs[stage][0] for _, costs in reports) for stage in stages},
                "cpu_s": {stage: sum(costs[stage][1] for _, costs in reports) for stage in stages},
            }
        )
    )


if __name__ == "__main__":
    main()
