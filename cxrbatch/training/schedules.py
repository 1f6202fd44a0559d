"""Learning-rate schedules."""

from __future__ import annotations

import math

from cxrbatch.training.checkpoint import Progress
from cxrbatch.training.recipes import Schedule

__all__ = ["learning_rate_of", "watch_plateau"]


def learning_rate_of(schedule: Schedule, base: float, epoch: int, step: int, steps: int, plateau_share: float) -> float:
    """The learning rate at an epoch and step (both counted from 0 within the phase of `steps` steps)."""
    if schedule.name == "step":
        return float(base * schedule.factor ** sum(epoch >= m for m in schedule.milestones))
    if schedule.name == "plateau":
        return base * plateau_share
    if schedule.name == "cosine":
        warm = min(1.0, (step + 1) / max(1, schedule.warm_up))
        gone = max(0, step - schedule.warm_up) / max(1, steps - schedule.warm_up)
        return base * warm * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, gone))))
    return base


def watch_plateau(schedule: Schedule, progress: Progress, val_loss: float) -> None:
    """Reduce the rate if validation has not improved for more than `patience` epochs (torch's ReduceLROnPlateau)."""
    if val_loss < progress.plateau_loss:
        progress.plateau_loss, progress.waited = val_loss, 0
        return
    progress.waited += 1
    if progress.waited > schedule.patience:
        progress.rate_share *= schedule.factor
        progress.waited = 0
