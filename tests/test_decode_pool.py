"""Real processes that really die: each costs at most its own file."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cxrbatch import unexpected
from cxrbatch.decoding.decode_pool import decode_all
from cxrbatch.decoding.decode_worker import Worker
from cxrbatch.decoding.memory import memory_limit_mib, worker_memory_mib
from cxrbatch.errors import TRANSIENT_REASONS, Fatal, ReasonCode, Rejected, Retry
from cxrbatch.types import DecodedImage, FoundFile, ImageFacts, Outcome

_LEAKED: list[bytearray] = []


def task(file: FoundFile) -> DecodedImage:
    """Do what the file's name says (runs in the worker)."""
    name = os.path.basename(file.path)
    if name.startswith("segfault"):
        ctypes.string_at(0)
    if name.startswith("exit"):
        os._exit(7)
    if name.startswith("once") and not os.path.exists(file.path + ".seen"):
        Path(file.path + ".seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if name.startswith("hang"):
        time.sleep(600)
    if name.startswith("spin"):
        Path(file.path + ".begun").touch()
        started = time.process_time()
        while time.process_time() - started < 1:
            pass
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
    if name.startswith("modules"):
        heavy = {"sqlalchemy", "pydantic", "torch", "openvino", "typer", "fsspec"} & sys.modules.keys()
        return DecodedImage(" ".join(sorted(heavy)), ImageFacts("png", 1, 1, 8), {})
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


def test_a_worker_keeps_what_one_image_leaves_for_the_next() -> None:
    reported = decode(files("large", "large too"), workers=1)
    image = reported["large too"].image
    assert image is not None
    assert int(image.sha256) < 1_000, "25 MiB are 6,400 pages, each cleared by the kernel"


def test_a_worker_loads_the_codecs_and_neither_store_nor_settings() -> None:
    """They would triple the time that it takes to start, and double its memory."""
    image = decode(files("modules"), workers=1)["modules"].image
    assert image is not None and image.sha256 == ""


def test_a_worker_that_stalls_is_stopped_by_the_parents_clock() -> None:
    """Also for the first file of a worker. Each of these is one: stopping the previous file made a new worker."""
    outcomes = decode(files("hang 1", "hang 2", "hang 3", "a", "hang 4", "b"), timeout_s=0.5, workers=1)
    reasons = {n: o.rejected.reason_code for n, o in outcomes.items() if o.rejected}
    assert reasons == dict.fromkeys(("hang 1", "hang 2", "hang 3", "hang 4"), ReasonCode.DECODE_TIMEOUT)
    assert not any(isinstance(o.rejected, Retry) for o in outcomes.values()), "the file is to blame, and that is final"


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]


def test_workers_are_started_as_they_are_needed() -> None:
    pool = decode_all(files("hang"), task, workers=4, timeout_s=20, memory_mib=2048)
    for _ in range(5):
        assert next(pool) is None
    assert len(children()) == 1
    pool.close()  # type: ignore[attr-defined]


def test_a_worker_that_is_killed_from_outside_every_time_is_not_the_file_s_fault() -> None:
    outcomes = decode(files("killed", "a", "segfault"))
    killed, crashed = outcomes["killed"].rejected, outcomes["segfault"].rejected
    assert isinstance(killed, Retry) and killed.reason_code in TRANSIENT_REASONS
    assert crashed and crashed.reason_code not in TRANSIENT_REASONS
    assert outcomes["a"].image is not None


PAUSED = """
import sys
sys.path[:0] = sys.argv[2:]
from test_decode_pool import decode, files
outcomes = decode(files("warm", "spin", folder=sys.argv[1]), timeout_s=1.5, workers=1)
print({name: str(outcome.rejected) for name, outcome in outcomes.items()})
"""


def test_a_pause_of_the_whole_machine_rejects_nobody(tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT for the process group, for longer than decode_timeout_s, like closing a laptop's lid."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", PAUSED, str(tmp_path), str(here.parent), str(here)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        while not (tmp_path / "spin.begun").exists():
            assert program.poll() is None
            time.sleep(0.02)
        os.killpg(program.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(program.pid, signal.SIGCONT)
        assert program.stdout is not None
        assert program.stdout.read() == "{'warm': 'None', 'spin': 'None'}\n"


def test_a_worker_that_somebody_stops_is_not_the_file_s_fault() -> None:
    outcomes = decode(files("stopped", "a"), timeout_s=0.3, workers=1)
    assert isinstance(outcomes["stopped"].rejected, Retry)
    assert outcomes["a"].image is not None


def test_a_share_that_does_not_answer_is_not_the_file_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only an unavailable share makes a process hang in the kernel (state D); here the state is faked.
    monkeypatch.setattr(Worker, "state_and_cpu_s", lambda worker: ("D", 0.0))
    rejected = decode(files("hang"), timeout_s=0.3, workers=1)["hang"].rejected
    assert isinstance(rejected, Retry) and rejected.reason_code is ReasonCode.UNREADABLE


def test_a_worker_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs in the kernel ignores SIGKILL; here the signal is not sent."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "kill", lambda process: None)
    before = {c.pid for c in children()}
    outcomes = decode(files("hang", "a"), timeout_s=0.3, workers=1)
    assert outcomes["a"].image is not None
    left = [c for c in children() if c.pid not in before]
    assert left and not multiprocessing.active_children(), "the end of the program would wait for them"
    for process in left:
        process.kill()
        process.wait()


def test_errors_that_nobody_expects_are_counted_and_named_without_their_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unexpected, "_counts", Counter())
    assert decode(files("panic 1", "panic 2", "a"))["panic 1"].rejected
    assert unexpected.total() == 2
    assert len(caplog.records) == 1, "the 1st, the 10th, the 100th of a kind"
    assert "error=BaseException where=test_decode_pool.py:" in caplog.text
    assert "a codec panics" not in caplog.text


@pytest.mark.parametrize(
    ("limit_mib", "workers", "expected"),
    [(24_000, 2, 4096), (8_192, 4, 1536), (16_384, 4, 3072), (1_000, 2, 1536), (500_000, 16, 4096)],
)
def test_workers_share_the_memory_that_is_there(limit_mib: int, workers: int, expected: int) -> None:
    assert worker_memory_mib(workers, limit_mib) == expected


@pytest.mark.parametrize(
    ("groups", "file", "limit"),
    [
        ("0::/", "sys/fs/cgroup/memory.max", 300),  # cgroup v2, as a container sees its own group
        ("0::/a/b", "sys/fs/cgroup/a/memory.max", 300),
        ("4:memory:/a\n0::/", "sys/fs/cgroup/memory/a/memory.limit_in_bytes", 300),  # cgroup v1
        ("0::/", "sys/fs/cgroup/nothing", None),
    ],
)
def test_a_container_s_limit_counts(tmp_path: Path, groups: str, file: str, limit: int | None) -> None:
    whole = memory_limit_mib(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / file).write_text(f"{300 * 2**20}\n")
    assert memory_limit_mib(tmp_path) == (whole if limit is None else limit)


def test_killing_workers_from_outside_loses_nothing() -> None:
    names = [str(i) for i in range(3000)]
    pool = decode_all(files(*names), task, workers=2, timeout_s=20, memory_mib=2048)
    got = []
    for i, outcome in enumerate(o for o in pool if o):
        got.append(outcome)
        if i in (10, 400, 1200):
            for child in children():
                child.kill()
    assert sorted(int(o.file.path.rpartition("/")[2]) for o in got) == list(range(3000))
    assert all(o.rejected is None for o in got)


def test_closing_early_leaves_no_process_behind() -> None:
    pool = decode_all(files(*map(str, range(100)), "hang"), task, workers=2, timeout_s=20, memory_mib=2048)
    next(o for o in pool if o)
    running = children()
    assert len(running) == 2
    pool.close()  # type: ignore[attr-defined]
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in running)


def test_a_machine_that_has_no_room_for_a_process_just_now_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = multiprocessing.process.BaseProcess.start, [True, True]

    def start_later(process: multiprocessing.process.BaseProcess) -> None:
        if refused:
            refused.pop()
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_later)
    assert decode(files("a", "b"), workers=1)["b"].image is not None


def test_workers_that_cannot_start_are_one_sentence_and_not_a_folder_of_crashes() -> None:
    with pytest.raises(Fatal, match="die while they start"):
        list(decode_all(files("a"), _Unpicklable(), workers=1, timeout_s=5, memory_mib=2048))


class _Unpicklable:
    """Fails to unpickle in the worker, before the worker is ready."""

    def __call__(self, file: FoundFile) -> DecodedImage:
        raise AssertionError

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_codecs_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imagecodecs.py").write_text("raise ImportError('no imagecodecs here')")
    monkeypatch.syspath_prepend(tmp_path)  # workers are spawned with our path
    with pytest.raises(Fatal, match="no imagecodecs here"):
        list(decode_all(files("a"), task, workers=1, timeout_s=5, memory_mib=2048))
