"""The output of a training run: on a terminal a progress bar on stderr, and one line per epoch on stdout."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Show", "what_comes_next"]


def what_comes_next(bundle: Path, data: Path, roles: str) -> str:
    """Where the bundle is that was trained on `data`, and the next command; `roles` are those of its stages."""
    if "disease" not in roles:
        return f"The gate is in {bundle}. Next: train a disease model into the same folder."
    calibrate = f"cxrbatch calibrate {shlex.quote(str(bundle))} --data {shlex.quote(str(data))}"
    if "gate" in roles:
        return f"The bundle is in {bundle}. Next: {calibrate}"
    add = f"cxrbatch models add-gate {shlex.quote(str(bundle))}"
    return (
        f"The bundle is in {bundle}. Next: {calibrate}\nIt has no gate and takes every image for a chest; first: {add}"
    )


class Show:
    """A context manager; call `step` after each batch and `epoch` after each epoch."""

    def __init__(self, epochs: int, done: int) -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._epochs = epochs
        self._bar = self._bars.add_task("training", total=epochs, completed=done)

    def __enter__(self) -> Show:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bars.stop()

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        text = f"epoch {epoch + 1}/{self._epochs}  loss {loss:.4f}"
        self._bars.update(self._bar, completed=epoch + step / steps, description=text)

    def epoch(self, entry: dict[str, Any], kept: bool) -> None:
        print(
            f"epoch {entry['epoch'] + 1}/{self._epochs}  "
            f"train loss {entry['train_loss']:.4f} accuracy {entry['train_accuracy']:.4f}  "
            f"validation loss {entry['val_loss']:.4f} accuracy {entry['val_accuracy']:.4f}  "
            f"rate {entry['learning_rate']:.1e}  {entry['seconds']:.0f} s{'  kept' if kept else ''}",
            flush=True,
        )
