"""Real processes that really die: each costs at most its own file."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cxrbatch.errors import Fatal, ReasonCode, Rejected
from cxrbatch.nouns import DecodedImage, FoundFile, ImageFacts, Outcome
from cxrbatch.workers import decode_all

_LEAKED: list[bytearray] = []


def task(file: FoundFile) -> DecodedImage:
    """What each name asks for (it runs in the worker)."""
    name = os.path.basename(file.path)
    if name.startswith("segfault"):
        ctypes.string_at(0)
    if name.startswith("exit"):
        os._exit(7)
    if name.startswith("once") and not os.path.exists(file.path + ".seen"):
        Path(file.path + ".seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("hang"):
        time.sleep(600)
    if name.startswith("hungry"):
        bytearray(4 * 2**30)
    if name.startswith("leaks"):
        with suppress(MemoryError):
            while True:
                _LEAKED.append(bytearray(2**26))
        del _LEAKED[-2:]
    if name.startswith("wants more than is left"):
        bytearray(2**28)
    if name.startswith("large"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            [bytearray(mib * 2**20) for mib in (10, 10, 5)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return DecodedImage(str(faults), ImageFacts("png", 1, 1, 8), {})
    if name.startswith("reject"):
        raise Rejected(ReasonCode.TRUNCATED, "cut short")
    if name.startswith("panic"):
        raise BaseException("a codec panics")
    return DecodedImage(name, ImageFacts("png", 1, 1, 8), {})


def files(*names: str, folder: str = "/x") -> Iterator[FoundFile]:
    return (FoundFile(f"{folder}/{name}", 1, 1, 1) for name in names)


def decode(names: Iterator[FoundFile], timeout_s: float = 20, workers: int = 2) -> dict[str, Outcome]:
    outcomes = [
        o for o in decode_all(names, task, workers=workers, timeout_s=timeout_s, memory_mib=2048) if o is not None
    ]
    by_name = {os.path.basename(o.file.path): o for o in outcomes}
    assert len(by_name) == len(outcomes), "each file has one outcome"
    return by_name


def test_a_worker_that_dies_costs_its_own_file_only(tmp_path: Path) -> None:
    names = ["a", "segfault", "b", "exit", "c", "reject", "panic", "hungry", "once", *map(str, range(20))]
    outcomes = decode(files(*names, folder=str(tmp_path)))
    assert set(outcomes) == set(names)
    reasons = {n: o.rejected.reason_code for n, o in outcomes.items() if o.rejected}
    assert reasons == {
        "segfault": ReasonCode.DECODER_CRASHED,
        "exit": ReasonCode.DECODER_CRASHED,
        "reject": ReasonCode.TRUNCATED,
        "panic": ReasonCode.DECODER_CRASHED,
        "hungry": ReasonCode.DECODER_OUT_OF_MEMORY,
    }  # and "once", killed from outside the first time, was read the second time


def test_a_worker_full_of_what_others_left_behind_is_not_the_file_s_fault() -> None:
    pool = decode_all(
        files("leaks", "wants more than is left", "hungry"), task, workers=1, timeout_s=20, memory_mib=1536
    )
    reasons = {os.path.basename(o.file.path): o.rejected and o.rejected.reason_code for o in pool if o}
    assert reasons == {
        "leaks": None,
        "wants more than is left": None,
        "hungry": ReasonCode.DECODER_OUT_OF_MEMORY,
    }


def test_a_worker_keeps_what_one_film_leaves_for_the_next() -> None:
    told = decode(files("large", "large too"), workers=1)
    image = told["large too"].image
    assert image is not None
    assert int(image.sha256) < 1_000, "25 MiB are 6,400 pages, each cleared by the kernel"


def test_a_worker_that_stalls_is_stopped_by_the_parents_clock() -> None:
    decode(files("warm", "up"))
    started = time.monotonic()
    pool = decode_all(files("a", "b", "hang", "c"), task, workers=1, timeout_s=1, memory_mib=2048)
    outcomes = {os.path.basename(o.file.path): o for o in pool if o}
    assert outcomes["hang"].rejected and outcomes["hang"].rejected.reason_code is ReasonCode.DECODE_TIMEOUT
    assert outcomes["c"].image is not None
    assert time.monotonic() - started < 60


def test_killing_workers_from_outside_loses_nothing() -> None:
    names = [str(i) for i in range(3000)]
    pool = decode_all(files(*names), task, workers=2, timeout_s=20, memory_mib=2048)
    got = []
    for i, outcome in enumerate(o for o in pool if o):
        got.append(outcome)
        if i in (10, 400, 1200):
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
    assert sorted(int(o.file.path.rpartition("/")[2]) for o in got) == list(range(3000))
    assert all(o.rejected is None for o in got)


def test_closing_early_leaves_no_process_behind() -> None:
    pool = decode_all(files(*map(str, range(100)), "hang"), task, workers=2, timeout_s=20, memory_mib=2048)
    next(o for o in pool if o)
    children = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
    assert len(children) == 2
    pool.close()  # type: ignore[attr-defined]
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)


def test_workers_that_cannot_start_are_one_sentence_and_not_a_folder_of_crashes() -> None:
    with pytest.raises(Fatal, match="die while they start"):
        list(decode_all(files("a"), _Unpicklable(), workers=1, timeout_s=5, memory_mib=2048))


class _Unpicklable:
    """Comes to pieces in the worker, before it is ready."""

    def __call__(self, file: FoundFile) -> DecodedImage:
        raise AssertionError

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_codecs_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imagecodecs.py").write_text("raise ImportError('no imagecodecs here')")
    monkeypatch.syspath_prepend(tmp_path)  # workers are spawned with our path
    with pytest.raises(Fatal, match="no imagecodecs here"):
        list(decode_all(files("a"), task, workers=1, timeout_s=5, memory_mib=2048))
