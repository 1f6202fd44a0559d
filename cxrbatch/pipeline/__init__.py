"""The pipeline: one chain of stages for scan and watch, and the only module that knows its order. Read this first.

    scan:  walk -> find_changed -> settle ------+
                                                +-> decode -> batch -> score -> record
    watch: FolderWatcher -> job queue -> claims +

Each stage is a generator that pulls from the one before it, so nothing accumulates: when the store is slow, the
folder is read slowly. `prefetch` lets decoding (in processes of its own) overlap with inference, and inference
with writing rows. To add a stage, write a generator over batches of Outcomes (an empty batch is a clock tick: pass
it on) and add it to the chain in `run`, once for both commands.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial

from cxrbatch.decoding.decode_pool import DecodeFile, decode_all
from cxrbatch.decoding.memory import worker_memory_mib
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import Rejected
from cxrbatch.failpoints import failpoint
from cxrbatch.imaging.limits import limits_of
from cxrbatch.inference.bundle import Bundle
from cxrbatch.inference.cascade import Cascade
from cxrbatch.inference.engines.protocol import InferenceEngine
from cxrbatch.intake.discover import Wanted, discover
from cxrbatch.intake.path_set import PathHashSet
from cxrbatch.intake.stability import settle
from cxrbatch.pipeline.batch import in_batches
from cxrbatch.pipeline.counts import Counts
from cxrbatch.pipeline.prefetch import prefetch
from cxrbatch.pipeline.record import record
from cxrbatch.settings import Settings
from cxrbatch.store import Recorded, Reprocess, RetryPolicy, Store, path_to_text
from cxrbatch.types import FoundFile, Outcome, Prediction

__all__ = ["Context", "Counts", "Sink", "find_changed", "run", "scan", "walk"]

_LOOK_UP = 2_000  # files in one query
_DECODED_PREFETCH = 32  # images, where the settings do not give a batch size
_SCORED_PREFETCH = 4  # batches


@dataclass(frozen=True, slots=True)
class Context:
    """What the stages of one run share."""

    settings: Settings
    bundle: Bundle
    identifiers: Identifiers
    roots: tuple[str, ...]  # nothing outside of these folders and files is opened
    counts: Counts
    progress: Callable[[Counts], None] = lambda counts: None  # called whenever `counts` has changed
    retry: RetryPolicy = field(default_factory=RetryPolicy)  # for the store; its heartbeat is called by every batch


@dataclass(frozen=True, slots=True)
class Sink:
    """Where outcomes go. `commit` writes a group of them in one transaction; it may raise StoreDown."""

    store: Store
    cascade_id: int
    commit: Callable[[list[Outcome]], Recorded]
    reprocess: Reprocess = "none"


def scan(
    found: Iterator[FoundFile],
    context: Context,
    store: Store,
    start: Callable[[], tuple[InferenceEngine, Sink]],
    *,
    reprocess: Reprocess = "none",
    limit: int | None = None,
    stop: threading.Event,
) -> None:
    """One pass over `found`: every new or changed file ends as one committed row.

    `start` is called once, and only when there is something to read: a scan of an unchanged folder loads no model.
    Once `stop` is set, no further file is opened. Work in progress is recorded; the next scan finds the rest.
    """
    cascade_id = store.cascade_id_of(context.bundle.key(context.settings.exact)) or 0  # 0: no row of it exists yet
    changed = itertools.islice(
        find_changed(found, store, cascade_id, reprocess, context.counts, context.progress, retry=context.retry), limit
    )
    first = next(changed, None)
    if first is None:
        return
    files = settle(itertools.chain([first], changed), context.settings.quiet_s)
    start_once = cache(start)
    while unscored := run(itertools.takewhile(lambda _: not stop.is_set(), files), context, start_once):
        files = iter(unscored)


def run(
    files: Iterator[FoundFile] | Iterator[FoundFile | None],
    context: Context,
    start: Callable[[], tuple[InferenceEngine, Sink]],
) -> list[FoundFile]:
    """Decode, score and record `files` until they end. A None in `files` means that nothing is ready right now.

    `start` opens the engine and the sink while the decode workers are starting. Returns the files that were linked to
    a content whose prediction was gone by then (pruned, or dropped with a path that came too late): a job queue has
    them again, a scan has to.
    """
    settings, unscored = context.settings, list[FoundFile]()
    decoded = _decode(files, context)
    with closing(prefetch(decoded, depth=2 * settings.batch_size or _DECODED_PREFETCH)) as prefetched:
        engine, sink = start()
        cascade = Cascade(context.bundle, engine)
        size = settings.batch_size or engine.batch_size
        batches = in_batches(prefetched, size, settings.batch_age_s)
        in_flight = set[str]()
        scored = score(batches, cascade, sink, context.retry, in_flight)
        with closing(prefetch(scored, _SCORED_PREFETCH)) as outcomes:
            ticking = _with_heartbeat(outcomes, context.retry.heartbeat)
            groups = record(ticking, sink.commit, context.retry, full=size, age_s=settings.record_age_s)
            for group, recorded in groups:
                in_flight.difference_update([outcome.image.sha256 for outcome in group if outcome.image])
                unscored += recorded.unscored
                context.counts.add([outcome for outcome in group if outcome.file not in recorded.unscored])
                context.progress(context.counts)
    return unscored


def _with_heartbeat(batches: Iterator[list[Outcome]], heartbeat: Callable[[], None]) -> Iterator[list[Outcome]]:
    """Call `heartbeat` for each batch. The end of the chain runs in the main thread: a stage that hangs stops it."""
    for batch in batches:
        heartbeat()
        yield batch


def _decode(files: Iterator[FoundFile] | Iterator[FoundFile | None], context: Context) -> Iterator[Outcome | None]:
    settings = context.settings
    workers = settings.workers or os.cpu_count() or 1
    return decode_all(
        files,
        DecodeFile(context.bundle.input_specs, limits_of(settings), context.identifiers, settings.exact, context.roots),
        workers=workers,
        timeout_s=settings.decode_timeout_s,
        memory_mib=settings.worker_memory_mib or worker_memory_mib(workers),
    )


def find_changed(
    found: Iterator[FoundFile],
    store: Store,
    cascade_id: int,
    reprocess: Reprocess,
    counts: Counts,
    progress: Callable[[Counts], None] = lambda counts: None,
    *,
    retry: RetryPolicy,
    look_only: bool = False,
) -> Iterator[FoundFile]:
    """Yield the files whose path, size or mtime is new, or that have no valid outcome from this cascade."""
    while some := list(itertools.islice(found, _LOOK_UP)):
        unchanged = retry(partial(store.unchanged, some, cascade_id, reprocess, look_only=look_only))
        counts.unchanged += len(unchanged)
        progress(counts)
        if len(unchanged) < len(some):
            yield from (file for file in some if file.path not in unchanged)


def score(
    batches: Iterator[list[Outcome]], cascade: Cascade, sink: Sink, retry: RetryPolicy, in_flight: set[str]
) -> Iterator[list[Outcome]]:
    """Give each decoded image its prediction. Identical bytes are scored once, under whatever file names.

    `in_flight` holds the sha256 of images whose prediction is not committed yet; the caller removes them.
    """
    for batch in batches:
        if not batch:
            yield batch
            continue
        first_of = {o.image.sha256: o.image for o in batch if o.image and not o.rejected}
        failpoint("pipeline.batched")
        known: set[str] = set()
        if sink.reprocess != "all":
            known = {sha256 for sha256 in first_of if sha256 in in_flight}
            known |= retry(partial(sink.store.predicted, list(first_of.keys() - known), sink.cascade_id))
        new = [image for sha256, image in first_of.items() if sha256 not in known]
        predictions = dict(zip((image.sha256 for image in new), cascade.score(new), strict=True))
        in_flight.update(sha256 for sha256, answer in predictions.items() if isinstance(answer, Prediction))
        failpoint("pipeline.scored")
        yield [_with_prediction(outcome, predictions) for outcome in batch]


def _with_prediction(outcome: Outcome, predictions: dict[str, Prediction | Rejected]) -> Outcome:
    """Attach the prediction. An image without one is already known: the store links the path to the existing row."""
    if outcome.image is None or outcome.rejected is not None:
        return outcome
    answer = predictions.get(outcome.image.sha256)
    if isinstance(answer, Rejected):
        return replace(outcome, rejected=answer)
    return replace(outcome, prediction=answer)


def walk(
    roots: Sequence[str], wanted: Wanted, stop: threading.Event, counts: Counts, seen: PathHashSet
) -> Iterator[FoundFile]:
    """Yield every file below `roots` until `stop` is set; add the text of every path to `seen`.

    `counts.complete` means that the walk finished: a path that it did not see is gone, unless it lies below a folder
    in `counts.unlisted`. A root without files counts as unlisted, because a lost share looks like an empty folder.
    """
    for root in roots:
        found_before = counts.found
        for file in discover([root], wanted, counts.unlisted, lambda path: seen.add(path_to_text(path))):
            if stop.is_set():
                return
            counts.found += 1
            seen.add(path_to_text(file.path))
            yield file
        if counts.found == found_before:
            counts.unlisted.append(root)
    counts.complete = True
