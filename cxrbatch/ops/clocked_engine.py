"""An engine whose networks are timed, for the metrics of a daemon."""

from __future__ import annotations

from typing import Any, cast

from prometheus_client import Histogram

from cxrbatch.inference.engines.protocol import InferenceEngine, Network

__all__ = ["clocked"]


def clocked(engine: InferenceEngine, seconds: Histogram) -> InferenceEngine:
    """The engine with a clock around each network; `seconds` has the label `stage`."""
    return cast(InferenceEngine, _ClockedEngine(engine, seconds))


class _ClockedEngine:
    """An engine whose networks are timed."""

    def __init__(self, engine: InferenceEngine, seconds: Histogram) -> None:
        self._engine, self._seconds = engine, seconds

    @property
    def batch_size(self) -> int:  # known once the stages are loaded
        return self._engine.batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def load(self, stage: Any) -> Network:
        network, seconds = self._engine.load(stage), self._seconds.labels(stage.role)

        def timed(model_inputs: Any, /) -> Any:
            with seconds.time():
                return network(model_inputs)

        return timed
