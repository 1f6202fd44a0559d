"""Every metric of cxrbatch: its name, its labels and what it means. docs/reference/metrics.md is made from here.

Each label takes one of a closed set of values, and each series is there from the start, at zero. No label and no
value is taken from an image, a file name or a sender. What the store says of itself (queue, reviews, drift) is the
same in every daemon on that store: add it up with `max`, never with `sum`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from cxrbatch import __version__, unexpected
from cxrbatch.errors import ReasonCode
from cxrbatch.store import Recorded
from cxrbatch.store.backlog import QUEUE_STATES, Backlog
from cxrbatch.store.outbox_schema import OutboxState
from cxrbatch.store.review_schema import ReviewAction
from cxrbatch.types import Decision, Outcome

__all__ = ["Metrics", "ReceiverMetrics", "described"]

_OUTCOMES = ("done", "rejected", "retry", "waiting", "late")
_FORMATS = ("dicom", "png", "jpeg", "tiff")
_DRIFT = ("label_psi", "confidence_ks", "ood_score_ks", "grey_mean_ks", "gate_rate", "unlike_rate", "reject_rate")
_RECEIVED = ("stored", "out_of_resources", "refused")
_RECEIVER_EVENTS = (
    "association_refused",
    "object_too_large",
    "store_failed",
    "disk_nearly_full",
    "share_unmounted",
    "duplicate_instance",
    "name_taken",
    "own_object_refused",
)
M = TypeVar("M", bound=MetricWrapperBase)
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SLOW_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class ReceiverMetrics:
    """The registry of one process, and what counts in it where no store is open: that of `cxrbatch receive`.

    `roots` is the number of its folders (known by their index).
    """

    def __init__(self, roots: int = 1) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each one, that nobody asks for
        self.registry = CollectorRegistry()
        build = self._gauge("build_info", "Always 1; the label holds the version.", version=[__version__])
        build.labels(__version__).set(1)
        self.heartbeat = self._gauge(
            "heartbeat_timestamp_seconds",
            "When the pipeline, or a receiver without one, last gave a sign of life (Unix time).",
        )
        self.alive = self._gauge("alive", "1 while /healthz says so: each part has given a sign of life lately.")
        self.received = self._counter(
            "received_instances", "C-STORE requests, by how they were answered.", result=_RECEIVED
        )
        self.receiver_events = self._counter(
            "receiver_events", "What the receiver wrote a line in the log about, by event.", event=_RECEIVER_EVENTS
        )
        self.disk_free = self._gauge(
            "disk_free_bytes",
            "Free on the disk of a SQLite store and of each folder (root0, …); NaN where it is not known.",
            what=[],
        )
        for index in range(roots):
            self.show_disk(f"root{index}", None)
        self.registry.register(_UnexpectedErrors())
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, **values: Iterable[str]) -> Counter:
        return _filled(Counter(f"cxrbatch_{name}", text, list(values), registry=self.registry), values)

    def _gauge(self, name: str, text: str, **values: Iterable[str]) -> Gauge:
        return _filled(Gauge(f"cxrbatch_{name}", text, list(values), registry=self.registry), values)

    def _seconds(self, name: str, text: str, buckets: Sequence[float], **values: Iterable[str]) -> Histogram:
        histogram = Histogram(f"cxrbatch_{name}", text, list(values), buckets=tuple(buckets), registry=self.registry)
        return _filled(histogram, values)

    def show_disk(self, what: str, free_bytes: int | None) -> None:
        """Free on the disk of a folder; None: not known (away, or a bucket), which is not 0."""
        self.disk_free.labels(what).set(math.nan if free_bytes is None else free_bytes)

    def answered(self, status: int) -> int:
        """A C-STORE request was answered with `status`; returns it."""
        result = "stored" if status == 0 else "out_of_resources" if status == 0xA700 else "refused"
        self.received.labels(result).inc()
        return status


class Metrics(ReceiverMetrics):
    """What counts in a process that works on a store.

    `labels` are what the bundle may answer, `roots` the number of watched folders.
    """

    def __init__(self, labels: Sequence[str] = (), roots: int = 0) -> None:
        super().__init__(roots)
        counter, gauge, seconds = self._counter, self._gauge, self._seconds
        self._started = time.time()
        self._acts = _Reviews()
        self._roots = [str(index) for index in range(roots)]
        # What this daemon does.
        self.processed = counter(
            "files_processed", "Files that got an outcome; late: another daemon had taken them over.", outcome=_OUTCOMES
        )
        self.rejected = counter(
            "files_rejected", "Outcomes without a score, by reason code.", reason=[str(code) for code in ReasonCode]
        )
        self.predictions = counter("predictions", "Images scored, by label and decision.", label=(), decision=())
        self.use_labels(labels)
        self.latency = seconds(
            "file_latency_seconds",
            "From the last change of a file (mtime) to its row; only of files that changed after the start.",
            _SLOW_S,
        )
        self.decode = seconds("decode_seconds", "Decoding of one file that could be decoded.", _FAST_S, format=_FORMATS)
        self.inference = seconds(
            "inference_seconds", "One pass of one network over one batch.", _FAST_S, stage=("gate", "disease")
        )
        self.commit_seconds = seconds("commit_seconds", "One transaction that was kept.", _FAST_S)
        self.walk = gauge(
            "root_walk_timestamp_seconds", "When a walk of this folder last ended (Unix time).", root=self._roots
        )
        self.paused = gauge("root_paused", "1 while this folder cannot be looked at.", root=self._roots)
        self.unlisted = gauge(
            "root_unlisted_folders",
            "Folders below this one that the last walk could not list: nobody knows what is in them.",
            root=self._roots,
        )
        # What the store says.
        self.store_up = gauge("store_up", "1 when the last question to the store was answered.")
        self.queue = gauge("queue_files", "Files without a final outcome, by state.", state=map(str, QUEUE_STATES))
        self.oldest = gauge("queue_oldest_age_seconds", "Since the oldest waiting or claimed file was queued.")
        self.review_waiting = gauge("review_waiting_files", "Files that need review and have none.")
        self.outbox = gauge("outbox_instances", "Objects for a PACS, by state.", state=map(str, OutboxState))
        self.registry.register(self._acts)
        self.drift = gauge(
            "drift_score",
            "Distance of the last 30 days from accepted days or the bundle's reference; NaN where it is not known.",
            statistic=_DRIFT,
        )
        self.drift_threshold = gauge(
            "drift_threshold",
            "The score above which drift is alarming; NaN where it is not known.",
            statistic=_DRIFT,
        )
        self.show_drift({})

    def use_labels(self, labels: Iterable[str]) -> None:
        """What a bundle may answer: its series begin at zero."""
        for label in labels:
            for decision in Decision:
                self.predictions.labels(label, str(decision))

    def count(self, outcomes: Sequence[Outcome], recorded: Recorded, took_s: float) -> None:
        """Outcomes that one transaction wrote (JobQueue.recorded)."""
        self.commit_seconds.observe(took_s)
        for outcome in _OUTCOMES:
            self.processed.labels(outcome).inc(getattr(recorded, outcome))
        now = time.time()
        for one in outcomes:
            if one.rejected is not None:
                self.rejected.labels(str(one.rejected.reason_code)).inc()
            elif one.prediction is not None:
                self.predictions.labels(one.prediction.label, str(one.prediction.decision)).inc()
            if one.image is not None and one.image.decode_s is not None:
                self.decode.labels(one.image.facts.format).observe(one.image.decode_s)
            changed = one.file.mtime_ns / 1e9
            if self._started <= changed <= now:
                self.latency.observe(now - changed)

    def show_drift(self, known: Mapping[str, tuple[float, float]]) -> None:
        """Score and threshold by statistic; of the others they are not known."""
        for name in _DRIFT:
            score, threshold = known.get(name, (math.nan, math.nan))
            self.drift.labels(name).set(score)
            self.drift_threshold.labels(name).set(threshold)

    def show_backlog(self, backlog: Backlog | None) -> None:
        """What the store said; None where it did not answer."""
        self.store_up.set(backlog is not None)
        if backlog is None:
            return
        for state, number in backlog.queue.items():
            self.queue.labels(state).set(number)
        self.oldest.set(backlog.oldest_age_s)
        self.review_waiting.set(backlog.review_waiting)
        for state, number in backlog.outbox.items():
            self.outbox.labels(state).set(number)
        self._acts.numbers = dict(backlog.reviews)


class _Reviews(Collector):
    """A counter whose value the store knows: it goes on over restarts.

    No series before the store has answered: after a zero, all reviews of before would count as new ones.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily("cxrbatch_reviews", "Acts of readers, by action.", labels=["action"])
        for action, number in self.numbers.items():
            family.add_metric([action], number)
        yield family


class _UnexpectedErrors(Collector):
    """What a catch-all made a reason code of, counted elsewhere (cxrbatch/unexpected.py)."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        meaning = "Errors that are bugs of ours or of a library; the log says where."
        yield CounterMetricFamily("cxrbatch_unexpected_errors", meaning, value=unexpected.total())


def _filled(metric: M, values: Mapping[str, Iterable[str]]) -> M:
    """The metric with every series of its labels' values, at zero."""
    if values:
        for combination in itertools.product(*values.values()):
            metric.labels(*combination)
    return metric


def described() -> list[tuple[str, str, str, str]]:
    """Name, kind, labels and meaning of every metric of ours, in order."""
    rows, metrics = [], Metrics(["NORMAL"], 1)
    metrics.show_backlog(Backlog({}, 0, 0, {str(action): 0 for action in ReviewAction}))
    for family in metrics.registry.collect():
        if not family.name.startswith("cxrbatch_"):
            continue
        suffix = "_total" if family.type == "counter" else ""
        names = sorted({name for sample in family.samples for name in sample.labels if name != "le"})
        rows.append((family.name + suffix, family.type, ", ".join(names), family.documentation))
    return rows
