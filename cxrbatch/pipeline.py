"""The road, and the only place that knows its order. Read this first.

    discover -> unchanged? -> settle -> decode -> batch -> cascade -> record

`scan` walks that road once. `watch` walks it for ever: there the folders are looked after by cxrbatch/lookout.py,
which writes what is new and whole into the ledger, and the road begins with what was claimed from it.

Each stage is a generator that pulls from the one before it, so nothing piles up anywhere: when the store is slow,
the folder is read slowly. `ahead` lets decoding (in its own processes) run while the networks do, and the networks
while rows are written. To add a stage, write a generator over batches of Outcomes (an empty one is a tick of the
clock: pass it on) and put it in its place in `scan` below.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from cxrbatch.ahead import ahead
from cxrbatch.batch import in_batches
from cxrbatch.bundles import Bundle
from cxrbatch.cascade import Cascade
from cxrbatch.crash import crash_point
from cxrbatch.dicom.identifiers import Identifiers
from cxrbatch.discover import Wanted, discover
from cxrbatch.engines.protocol import Engine
from cxrbatch.errors import Rejected, Retry
from cxrbatch.formats.limits import Limits
from cxrbatch.nouns import FoundFile, Outcome, Verdict
from cxrbatch.record import record
from cxrbatch.seen import Seen
from cxrbatch.settings import Settings
from cxrbatch.settle import settle
from cxrbatch.store import Patience, Reprocess, Run, Store, Work, path_to_text
from cxrbatch.workers import DecodeFile, decode_all

__all__ = ["ScanCounts", "find_changed", "scan", "stopping", "walk", "watch"]

_LOOK_UP = 2_000  # files in one question to the store
_DECODED_AHEAD = 32  # planes, should the settings not say how large a batch is
_SCORED_AHEAD = 4  # batches


@dataclass(slots=True)
class ScanCounts:
    """What one scan has done so far; the progress bar and the closing table read it."""

    found: int = 0
    unchanged: int = 0
    known_content: int = 0  # the same bytes under another name: linked, not scored again
    labels: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by reason code
    whole: bool = False  # every folder was read to its end

    @property
    def done(self) -> int:
        return self.unchanged + self.processed

    @property
    def processed(self) -> int:
        return self.labels.total() + self.known_content + self.rejected.total()


def scan(
    found: Iterator[FoundFile],
    settings: Settings,
    bundle: Bundle,
    store: Store,
    start: Callable[[], tuple[Engine, Run]],
    *,
    identifiers: Identifiers,
    reprocess: Reprocess = "none",
    limit: int | None = None,
    stop: threading.Event,
    counts: ScanCounts,
    progress: Callable[[ScanCounts], None] = lambda counts: None,
) -> None:
    """One pass over `found`: every file ends as one committed row.

    `start` is called once, and only when there is something to read: a scan of an unchanged folder loads no model.
    Once `stop` is set no further file is opened; what is in hand is recorded, and the next scan finds the rest.
    """
    cascade_id = store.cascade_id_of(bundle.key(settings.exact)) or 0  # 0: this cascade has said nothing here yet
    changed = itertools.islice(find_changed(found, store, cascade_id, reprocess, counts, progress), limit)
    first = next(changed, None)
    if first is None:
        return
    settled = settle(itertools.chain([first], changed), settings.quiet_s)
    wanted = itertools.takewhile(lambda _: not stop.is_set(), settled)
    decoded = _decoded(wanted, settings, bundle, identifiers)
    patience = Patience()
    with closing(ahead(decoded, depth=2 * settings.batch_size or _DECODED_AHEAD)) as decoded_ahead:
        engine, run = start()  # while the decoders are busy already
        cascade = Cascade(bundle, engine)
        size = settings.batch_size or engine.batch_size
        batches = in_batches(decoded_ahead, size, settings.batch_age_s)
        in_flight = set[str]()
        scored = score(batches, cascade, store, run.cascade_id, reprocess, patience, in_flight)
        commit = partial(store.record, run.run_id, run.cascade_id, replace=reprocess == "all")
        _record_all(scored, commit, size, settings.record_age_s, patience, in_flight, counts, progress)


def watch(
    claimed: Iterator[FoundFile | None],
    settings: Settings,
    bundle: Bundle,
    work: Work,
    start: Callable[[], Engine],
    *,
    identifiers: Identifiers,
    patience: Patience,
    counts: ScanCounts,
    progress: Callable[[ScanCounts], None] = lambda counts: None,
) -> None:
    """The same road for the files that `claimed` hands out; its None means that there is nothing to do just now.

    Ends when `claimed` does, with everything in hand recorded. `patience.beat` is called all the while.
    """
    decoded = _decoded(claimed, settings, bundle, identifiers)
    with closing(ahead(decoded, depth=2 * settings.batch_size or _DECODED_AHEAD)) as decoded_ahead:
        engine = start()  # while the decoders start too
        cascade = Cascade(bundle, engine)
        size = settings.batch_size or engine.batch_size
        batches = in_batches(decoded_ahead, size, settings.batch_age_s)
        in_flight = set[str]()
        scored = score(batches, cascade, work.store, work.run.cascade_id, "none", patience, in_flight)
        _record_all(scored, work.record, size, settings.record_age_s, patience, in_flight, counts, progress)


def _record_all(
    scored: Iterator[list[Outcome]],
    commit: Callable[[list[Outcome]], object],
    full: int,
    age_s: float,
    patience: Patience,
    in_flight: set[str],
    counts: ScanCounts,
    progress: Callable[[ScanCounts], None],
) -> None:
    """The end of the road: rows are written while the next batches are scored."""
    with closing(ahead(scored, _SCORED_AHEAD)) as scored_ahead:
        beating = _beating(scored_ahead, patience.beat)
        for group in record(beating, commit, patience, full=full, age_s=age_s):
            in_flight.difference_update([outcome.image.sha256 for outcome in group if outcome.image])
            _count(group, counts)
            progress(counts)


def _beating(batches: Iterator[list[Outcome]], beat: Callable[[], None]) -> Iterator[list[Outcome]]:
    """At the end of the road and in the main thread: whatever hangs on the road stops the beat."""
    for batch in batches:
        beat()
        yield batch


def _decoded(
    files: Iterator[FoundFile] | Iterator[FoundFile | None],
    settings: Settings,
    bundle: Bundle,
    identifiers: Identifiers,
) -> Iterator[Outcome | None]:
    return decode_all(
        files,
        DecodeFile(bundle.plane_specs, _limits(settings), identifiers, settings.exact),
        workers=settings.workers or os.cpu_count() or 1,
        timeout_s=settings.decode_timeout_s,
        memory_mib=settings.worker_memory_mib,
    )


def find_changed(
    found: Iterator[FoundFile],
    store: Store,
    cascade_id: int,
    reprocess: Reprocess,
    counts: ScanCounts,
    progress: Callable[[ScanCounts], None] = lambda counts: None,
    *,
    look_only: bool = False,
) -> Iterator[FoundFile]:
    """Only the files whose path, size and mtime are new, or whose outcome does not stand for this cascade."""
    while some := list(itertools.islice(found, _LOOK_UP)):
        unchanged = store.unchanged(some, cascade_id, reprocess, look_only=look_only)
        counts.unchanged += len(unchanged)
        progress(counts)
        if len(unchanged) < len(some):
            yield from (file for file in some if file.path not in unchanged)


def score(
    batches: Iterator[list[Outcome]],
    cascade: Cascade,
    store: Store,
    cascade_id: int,
    reprocess: Reprocess,
    patience: Patience,
    in_flight: set[str],
) -> Iterator[list[Outcome]]:
    """Give each decoded image its verdict. The same bytes are scored once, whatever they are called.

    `in_flight` holds the contents that have a verdict on its way to the store; whoever records takes them out.
    """
    for batch in batches:
        if not batch:
            yield batch
            continue
        first_of = {o.image.sha256: o.image for o in batch if o.image and not o.rejected}
        crash_point("road.batched")
        known: set[str] = set()
        if reprocess != "all":
            known = {sha256 for sha256 in first_of if sha256 in in_flight}
            known |= patience(partial(store.verdicts_of, list(first_of.keys() - known), cascade_id))
        new = [image for sha256, image in first_of.items() if sha256 not in known]
        verdicts = dict(zip((image.sha256 for image in new), cascade.score(new), strict=True))
        in_flight.update(sha256 for sha256, answer in verdicts.items() if isinstance(answer, Verdict))
        crash_point("road.scored")
        yield [_with_verdict(outcome, verdicts) for outcome in batch]


def _with_verdict(outcome: Outcome, verdicts: dict[str, Verdict | Rejected]) -> Outcome:
    """An image without a verdict here is known content: the store links the path to what it has."""
    if outcome.image is None or outcome.rejected is not None:
        return outcome
    answer = verdicts.get(outcome.image.sha256)
    if isinstance(answer, Rejected):
        return replace(outcome, rejected=answer)
    return replace(outcome, verdict=answer)


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_file_mib=settings.max_file_mib,
        max_pixels_mpx=settings.max_pixels_mpx,
        max_inflated_mib=settings.max_inflated_mib,
        min_side_px=settings.min_side_px,
    )


def walk(
    roots: Sequence[str], wanted: Wanted, stop: threading.Event, counts: ScanCounts, seen: Seen
) -> Iterator[FoundFile]:
    """Everything below `roots`, until `stop` is set; fills `seen` with the path texts on the way.

    `counts.whole` says at the end whether all of it was seen, so that what was not seen is known to be gone.
    """
    whole = True
    for file in discover(roots, wanted):
        if stop.is_set():
            return
        counts.found += 1
        seen.add(path_to_text(file.path))
        if file.problem is not None and isinstance(file.problem, Retry):
            whole = False  # a folder that cannot be listed hides its files
        yield file
    counts.whole = whole


def _count(batch: list[Outcome], counts: ScanCounts) -> None:
    for outcome in batch:
        if outcome.rejected is not None:
            counts.rejected[outcome.rejected.reason_code] += 1
        elif outcome.verdict is None:
            counts.known_content += 1
        else:
            counts.labels[outcome.verdict.label] += 1
            counts.decisions[outcome.verdict.decision] += 1


@contextmanager
def stopping(stop: threading.Event) -> Iterator[dict[str, int]]:
    """SIGINT and SIGTERM set `stop`; a second one ends the process at once. Yields {'signal': number} once caught."""
    caught: dict[str, int] = {}

    def on_signal(signum: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        caught["signal"] = signum
        stop.set()

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
