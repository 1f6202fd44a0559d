"""`cxrbatch scan`: check everything that can be checked, then scan, then export."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cxrbatch import unexpected
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines import open_engine
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.intake.discover import Wanted, count_names, discover, roots_of
from cxrbatch.intake.path_set import PathHashSet
from cxrbatch.intake.remote import is_remote
from cxrbatch.mounts import mount_points_below
from cxrbatch.ops.cluster import check_cluster_settings, connected, distribute
from cxrbatch.ops.cluster_runner import Job, folders_of, named_of
from cxrbatch.ops.key_file import identifiers_of
from cxrbatch.ops.progress import ScanSummary, print_summary, progress_bar
from cxrbatch.ops.setup import begin_run, stopping, wanted_of
from cxrbatch.ops.terminal import plain, to_stdout
from cxrbatch.pipeline import Context, Counts, Sink, find_changed, scan, walk
from cxrbatch.settings import Settings
from cxrbatch.store import FileState, Reprocess, RetryPolicy, Run, Store, only_writer
from cxrbatch.store.connection import store_file
from cxrbatch.store.export import check_writable, write_csv, write_jsonl, write_parquet

__all__ = ["Exports", "run_scan"]


@dataclass(frozen=True, slots=True)
class Exports:
    """The files to which the rows of the scanned paths are exported; "-" is stdout."""

    csv: str | None = None
    jsonl: str | None = None
    parquet: str | None = None

    def targets(self) -> list[tuple[Callable[[str, Iterable[Any]], int], str]]:
        given = ((write_csv, self.csv), (write_jsonl, self.jsonl), (write_parquet, self.parquet))
        return [(write, path) for write, path in given if path is not None]


def run_scan(
    settings: Settings,
    paths: Sequence[str | Path],
    exports: Exports,
    *,
    reprocess: Reprocess,
    limit: int | None,
    dry_run: bool,
    error_on_empty: bool,
    quiet: bool,
    ray: str | None = None,
) -> ExitCode:
    """Scan, write the exports, print the closing table. Raises Fatal before any work if something is wrong.

    With `ray` (the address of a Ray cluster) its nodes do the work, and this process lists the files.
    """
    if ray is not None:
        check_cluster_settings(settings, limit=limit, reprocess=reprocess)
    roots = roots_of(paths)
    files = [os.path.abspath(path) for _, path in exports.targets()]  # of "-" too, which is one stdout
    if len(set(files)) < len(files):
        raise Fatal("Two exports go to one file: give each its own.", ExitCode.USAGE)
    for write, path in exports.targets():
        check_writable(path, write)
    bundle = load_bundle(settings.cascade)
    started = time.monotonic()
    wanted = wanted_of(settings, [path for _, path in exports.targets() if path != "-"])
    if dry_run:
        found_any = _dry_run(settings.db, roots, wanted, bundle.key(settings.exact), reprocess)
        return ExitCode.NOTHING_MATCHED if error_on_empty and not found_any else ExitCode.OK
    nodes = None if ray is None else connected(ray)
    with only_writer(settings.db), Store.open(settings.db) as store:
        on_screen = Console(stderr=True, quiet=quiet)
        for warning in store.warnings:
            on_screen.print(f"[yellow]{warning}[/yellow]", highlight=False)
        if bundle.lacks:
            on_screen.print(escape(plain(bundle.lacks)), style="yellow", highlight=False, soft_wrap=True)
        identifiers = identifiers_of(settings, store)
        runs: list[Run] = []
        retry = RetryPolicy()  # a store that goes away for a moment does not end a scan of hours

        def start() -> tuple[InferenceEngine, Sink]:
            engine = open_engine(settings.engine, settings.device, bundle)
            run = retry(partial(begin_run, store, settings, bundle, engine))
            runs.append(run)
            commit = partial(store.record, run.run_id, run.cascade_id, replace=reprocess == "all")
            return engine, Sink(store, run.cascade_id, commit, reprocess)

        stop, counts, seen = threading.Event(), Counts(), PathHashSet()
        known_mounts = store.note_mounts(roots, _mount_points(roots))
        began, found = store.time(), walk(roots, wanted, stop, counts, seen)
        with stopping(stop) as caught, progress_bar(on_screen, partial(count_names, roots, wanted)) as progress:
            context = Context(settings, bundle, identifiers, tuple(roots), counts, progress, retry)
            if nodes is None:
                scan(found, context, store, start, reprocess=reprocess, limit=limit, stop=stop)
            else:
                runs.append(retry(partial(begin_run, store, settings, bundle, None)))
                key = bundle.key(settings.exact)
                job = Job(settings, identifiers, tuple(roots), runs[0], key, folders_of(roots), named_of(roots))
                distribute(nodes, found, store, job, counts, progress, stop)
        if counts.complete and counts.found:  # an empty root may be a lost share
            if not runs:
                runs.append(retry(partial(begin_run, store, settings, bundle, None)))
            every_row_seen = counts.done == counts.found == retry(store.present)
            if not every_row_seen:
                unmounted = known_mounts - _mount_points(roots)
                for folder in sorted(unmounted | set(counts.unlisted)):
                    why = _why_left(folder, folder in unmounted)
                    on_screen.print(f"[yellow]{why}[/yellow]", highlight=False, soft_wrap=True)
                folders = [root for root in roots if is_remote(root) or os.path.isdir(root)]
                mark = partial(store.mark_missing, unlisted=counts.unlisted, unmounted=unmounted, since=began)
                retry(partial(mark, runs[0].run_id, folders, seen))
        for run in runs:
            counted = {"processed": counts.processed, "unchanged": counts.unchanged}
            retry(partial(store.end_run, run.run_id, counted | {"unexpected_errors": unexpected.total()}))
        seconds = time.monotonic() - started
        summary = retry(partial(_summary, store, roots, counts, seconds, stopped=bool(caught)))
        for write, path in exports.targets():
            write(path, (row for row in store.results(roots=roots) if row.state != FileState.MISSING))
    if not quiet and "-" not in (exports.csv, exports.jsonl):
        print_summary(to_stdout(), summary)
    if not counts.found and not caught:
        on_screen.print(escape(_nothing_matched(roots, settings)), style="yellow", highlight=False, soft_wrap=True)
    if caught:  # also by SIGTERM: whoever sent it must not take a part for the whole
        return ExitCode.INTERRUPTED
    if error_on_empty and not counts.found:
        return ExitCode.NOTHING_MATCHED
    return ExitCode.SOME_REJECTED if summary.rejected else ExitCode.OK


def _nothing_matched(roots: Sequence[str], settings: Settings) -> str:
    given = [f"fits --include {' '.join(settings.include)}"] if settings.include else []
    given += [f"is left by --exclude {' '.join(settings.exclude)}"] if settings.exclude else []
    where = roots[0] if len(roots) == 1 else f"{roots[0]} and {len(roots) - 1:,} more"  # a shell may name thousands
    what = " and ".join(given)
    if not what:
        return plain(f"There is no file in {where}: nothing was read.")
    how = "globs on the name, or on the path below the folder"
    return plain(f"No file in {where} {what} ({how}): nothing was read; the totals are of earlier scans.")


def _mount_points(roots: Sequence[str]) -> frozenset[str]:
    return frozenset().union(
        *(mount_points_below(root) for root in roots if not is_remote(root) and os.path.isdir(root))
    )


def _why_left(folder: str, unmounted: bool) -> str:
    why = "is not mounted any more" if unmounted else "is empty or could not be listed"
    return escape(f"{folder} {why}: what is known of the files below it is left as it is.")


def _dry_run(url: str, roots: Sequence[str], wanted: Wanted, cascade_key: str, reprocess: Reprocess) -> bool:
    """Count the files that would be read, by name only; does not create a store. Returns whether there is any file."""
    counts, found = Counts(), discover(roots, wanted)
    if (file := store_file(url)) and not file.exists():
        changed = sum(1 for _ in found)
    else:
        with Store.open(url, may_create=False, read_only=True) as store:
            cascade_id = store.cascade_id_of(cascade_key) or 0  # 0: no row of it exists yet
            changed = sum(
                1
                for _ in find_changed(found, store, cascade_id, reprocess, counts, retry=RetryPolicy(), look_only=True)
            )
    print(f"{changed:,} file(s) would be read; {counts.unchanged:,} are unchanged since last time.")
    return bool(changed or counts.unchanged)


def _summary(store: Store, roots: Sequence[str], counts: Counts, seconds: float, *, stopped: bool) -> ScanSummary:
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
