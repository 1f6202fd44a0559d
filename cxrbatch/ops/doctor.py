"""`cxrbatch doctor`: one line per check, with what to do about a problem."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import psutil
from rich.text import Text

from cxrbatch.decoding.memory import worker_memory_mib
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.ops.key_file import identifiers_of, key_file_of
from cxrbatch.ops.terminal import to_stdout
from cxrbatch.settings import Settings, without_password
from cxrbatch.store.connection import store_file

__all__ = ["run_doctor"]

Health = Literal["ok", "note", "bad"]
Line = tuple[Health, str]
_MARKS = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "bad": ("bad ", "red")}


def run_doctor(settings: Settings) -> ExitCode:
    """Print every check; exit 1 if one of them would stop a scan."""
    checks: list[tuple[str, Callable[[Settings], Iterator[Line]]]] = [
        ("machine", _machine),
        ("decoders", _decoders),
        ("engine", _engine),
        ("bundle", _bundle),
        ("store", _store),
        ("privacy", _privacy),
    ]
    console = to_stdout()
    worst: set[Health] = set()
    for name, check in checks:
        try:
            lines = list(check(settings))
        except Fatal as fatal:
            lines = [("bad", str(fatal))]
        for health, sentence in lines:
            mark, colour = _MARKS[health]
            console.print(Text.assemble((mark, colour), f"  {name:9} ", sentence), soft_wrap=True)
            worst.add(health)
    return ExitCode.FATAL if "bad" in worst else ExitCode.OK


def _machine(settings: Settings) -> Iterator[Line]:
    cores = os.cpu_count() or 1
    memory = psutil.virtual_memory()
    workers = settings.workers or cores
    yield "ok", f"{cores} core(s), {memory.total / 2**30:.1f} GiB of memory; {workers} decode worker(s)"
    store = store_file(settings.db)
    folder = store.parent.absolute() if store and store.parent.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free / 2**30
    yield ("ok" if free > 1 else "bad"), f"{free:.1f} GiB free in {folder}" + ("" if free > 1 else "; make room first")
    memory_mib = settings.worker_memory_mib or worker_memory_mib(workers)
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if allowed != resource.RLIM_INFINITY and allowed < memory_mib * 2**20:
        yield "note", f"`ulimit -v` leaves {allowed >> 20:,} MiB for a decode worker; {memory_mib:,} are meant"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 256 + 4 * workers:
        yield "bad", f"only {files} open files allowed; raise `ulimit -n` to 1024"
    else:
        yield "ok", f"{files:,} open files allowed"
    watches = _number(Path("/proc/sys/fs/inotify/max_user_watches"))
    if watches is not None and watches < 65_536:
        yield "note", f"inotify may watch {watches:,} folders; for larger trees raise fs.inotify.max_user_watches"


def _decoders(settings: Settings) -> Iterator[Line]:
    from cxrbatch.imaging.dicom.frames import decoder_table

    for name, decoder in decoder_table():
        if decoder is None:
            yield "bad", f"{name}: nothing decodes it; install imagecodecs again"
    there = [name for name, decoder in decoder_table() if decoder]
    yield "ok", f"{len(there)} DICOM transfer syntaxes: {', '.join(there)}; PNG, JPEG, TIFF"


def _engine(settings: Settings) -> Iterator[Line]:
    from cxrbatch.inference.engines import open_engine

    engine = open_engine(settings.engine, settings.device)
    yield "ok", f"{engine.name} {engine.version} on {engine.device}"
    if engine.device == "cpu" and settings.batch_size > engine.batch_size:
        yield "note", f"batch_size {settings.batch_size} is not faster than {engine.batch_size} on a CPU"


def _bundle(settings: Settings) -> Iterator[Line]:
    bundle = load_bundle(settings.cascade)
    yield "ok", f"{bundle.name} {bundle.version}, hashes match, classes {', '.join(bundle.disease.classes)}"
    if bundle.lacks:
        yield "note", bundle.lacks


def _store(settings: Settings) -> Iterator[Line]:
    from cxrbatch.store import Store, StoreDown, migrate

    name = without_password(settings.db)
    if (file := store_file(settings.db)) and not file.exists():
        yield "ok", f"{name} is not there yet; the first scan makes it"
        return
    try:
        with Store.open(settings.db, may_create=False) as store:
            files = sum(store.counts().by_state.values())
            yield "ok", f"{name} at schema {migrate.head()}, {files:,} file(s)"
            for warning in store.warnings:
                yield "note", warning
    except StoreDown as down:
        yield "bad", str(down)


def _privacy(settings: Settings) -> Iterator[Line]:
    if settings.phi == "keep":
        yield "note", 'phi = "keep": patient IDs and accession numbers go into the store as they are'
    elif settings.phi == "drop":
        yield "ok", 'phi = "drop": no identifiers are stored'
    else:
        key = key_file_of(settings)
        if key.exists():
            identifiers_of(settings)  # raises Fatal where it cannot be used
        there = "is there; back it up" if key.exists() else "will be made by the first scan; back it up then"
        yield "ok", f'phi = "hash": the key file {key} {there}'


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
