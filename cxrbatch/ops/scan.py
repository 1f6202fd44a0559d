"""`cxrbatch scan`, put together: check everything that can be checked, then work, then export."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cxrbatch import __version__
from cxrbatch.bundles import Bundle, load_bundle
from cxrbatch.discover import Wanted, count_names, discover, roots_of
from cxrbatch.engines import open_engine
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import ExitCode
from cxrbatch.ops.key_file import identifiers_of
from cxrbatch.ops.progress import ScanSummary, print_summary, progress_bar
from cxrbatch.ops.settings_table import without_password
from cxrbatch.ops.terminal import to_stdout
from cxrbatch.pipeline import ScanCounts, find_changed, scan, stopping, walk
from cxrbatch.seen import Seen
from cxrbatch.settings import Settings
from cxrbatch.store import CascadeIdentity, FileState, Reprocess, Run, Store, only_writer
from cxrbatch.store.export import check_writable, write_csv, write_jsonl, write_parquet
from cxrbatch.store.writer_lock import LOCK_SUFFIX

__all__ = ["Exports", "identity_of", "run_scan", "wanted_of"]


@dataclass(frozen=True, slots=True)
class Exports:
    """Where the rows of the scanned paths are written besides the store; "-" is stdout."""

    csv: str | None = None
    jsonl: str | None = None
    parquet: str | None = None

    def targets(self) -> list[tuple[Callable[[str, Iterable[Any]], int], str]]:
        given = ((write_csv, self.csv), (write_jsonl, self.jsonl), (write_parquet, self.parquet))
        return [(write, path) for write, path in given if path is not None]


def run_scan(
    settings: Settings,
    paths: Sequence[Path],
    exports: Exports,
    *,
    reprocess: Reprocess,
    limit: int | None,
    dry_run: bool,
    error_on_empty: bool,
    quiet: bool,
) -> ExitCode:
    """Scan, write the exports, print the closing table. Raises Fatal before any work when something is amiss."""
    roots = roots_of(paths)
    for _, path in exports.targets():
        check_writable(path)
    bundle = load_bundle(settings.cascade)
    started = time.monotonic()
    with nullcontext() if dry_run else only_writer(settings.db), Store.open(settings.db) as store:
        wanted = wanted_of(settings, store, [path for _, path in exports.targets() if path != "-"])
        if dry_run:
            return _say_what_would_be_read(roots, wanted, store, bundle.key(settings.exact), reprocess)
        on_screen = Console(stderr=True, quiet=quiet)
        for warning in store.warnings:
            on_screen.print(f"[yellow]{warning}[/yellow]", highlight=False)
        identifiers = identifiers_of(settings)
        runs: list[Run] = []

        def begin(engine: Engine | None) -> Run:
            described = f"{engine.name} {engine.version}; Python {platform.python_version()}" if engine else ""
            runs.append(
                store.begin_run(
                    json.dumps({k: without_password(str(v)) for k, v in settings.model_dump().items()}),
                    identity_of(bundle, settings.exact),
                    device=engine.device if engine else "",
                    engine=described,
                    host=socket.gethostname(),
                    version=__version__,
                )
            )
            return runs[0]

        def start() -> tuple[Engine, Run]:
            engine = open_engine(settings.engine, settings.device, bundle)
            return engine, begin(engine)

        stop, counts, seen = threading.Event(), ScanCounts(), Seen()
        found = walk(roots, wanted, stop, counts, seen)
        with stopping(stop) as caught, progress_bar(on_screen, partial(count_names, roots, wanted)) as progress:
            scan(
                found,
                settings,
                bundle,
                store,
                start,
                identifiers=identifiers,
                reprocess=reprocess,
                limit=limit,
                stop=stop,
                counts=counts,
                progress=progress,
            )
        if counts.whole and counts.found:  # an empty root may be a share that has dropped out
            run_id = runs[0].run_id if runs else begin(None).run_id
            every_row_seen = counts.done == counts.found == store.present()
            if not every_row_seen:
                store.mark_missing(run_id, [root for root in roots if os.path.isdir(root)], seen)
        for run in runs:
            store.end_run(run.run_id, {"processed": counts.processed, "unchanged": counts.unchanged})
        summary = _summary(store, roots, counts, time.monotonic() - started, stopped=bool(caught))
        for write, path in exports.targets():
            write(path, (row for row in store.results(roots=roots) if row.state != FileState.MISSING))
    if not quiet and "-" not in (exports.csv, exports.jsonl):
        print_summary(to_stdout(), summary)
    if caught.get("signal") == signal.SIGINT:
        return ExitCode.INTERRUPTED
    if error_on_empty and not counts.found:
        return ExitCode.NOTHING_MATCHED
    return ExitCode.SOME_REJECTED if summary.rejected else ExitCode.OK


def identity_of(bundle: Bundle, exact: bool) -> CascadeIdentity:
    return CascadeIdentity(
        bundle.name,
        f"{bundle.version} exact" if exact else bundle.version,
        bundle.key(exact),
        json.dumps(bundle.manifest),
        tuple(stage.role for stage in bundle.stages),
        tuple(stage.sha256 for stage in bundle.stages),
    )


def wanted_of(settings: Settings, store: Store, exports: Sequence[str] = ()) -> Wanted:
    """What counts in the folders: not our own store, key and exports, should they lie there."""
    ours = [os.path.abspath(path) for path in exports]
    ours += [os.path.abspath(settings.id_key_file)]
    if store.engine.dialect.name == "sqlite":
        database = os.path.abspath(str(store.engine.url.database))
        ours += [database + suffix for suffix in ("", "-wal", "-shm", "-journal", LOCK_SUFFIX)]
    return Wanted(tuple(settings.include), tuple(settings.exclude), tuple(settings.ignore_suffixes), frozenset(ours))


def _say_what_would_be_read(
    roots: Sequence[str], wanted: Wanted, store: Store, cascade_key: str, reprocess: Reprocess
) -> ExitCode:
    counts = ScanCounts()
    cascade_id = store.cascade_id_of(cascade_key) or 0  # 0: no cascade, nothing of it is known
    found = discover(roots, wanted)
    changed = sum(1 for _ in find_changed(found, store, cascade_id, reprocess, counts, look_only=True))
    print(f"{changed:,} file(s) would be read; {counts.unchanged:,} are unchanged since last time.")
    return ExitCode.OK


def _summary(store: Store, roots: Sequence[str], counts: ScanCounts, seconds: float, *, stopped: bool) -> ScanSummary:
    stored = store.counts(roots)
    return ScanSummary(
        files=sum(number for state, number in stored.by_state.items() if state != FileState.MISSING),
        labels=stored.by_label,
        needs_review=stored.to_review,
        rejected=stored.by_reason,
        missing=stored.by_state.get(FileState.MISSING, 0),
        processed_now=counts.processed,
        unchanged=counts.unchanged,
        seconds=round(seconds, 3),
        stopped=stopped,
    )
