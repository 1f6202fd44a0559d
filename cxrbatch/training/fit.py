"""Train one network by a recipe and write it into a bundle; `train` is the whole experiment in order."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import SubsetRandomSampler

from cxrbatch.allocator import keep_freed_memory
from cxrbatch.engines.networks import FeatureNetwork
from cxrbatch.errors import Fatal
from cxrbatch.training import plots
from cxrbatch.training.backbones import freeze, start_network
from cxrbatch.training.batches import EpochFilms, batches, fixed_batches, on_grid
from cxrbatch.training.bundle_writer import StageDraft, write_stage
from cxrbatch.training.checkpoint import Progress, load_checkpoint, restore, save_checkpoint
from cxrbatch.training.datasets import balanced_weights
from cxrbatch.training.losses import guess_of, loss_of, mixup, target_of
from cxrbatch.training.mixstyle import mixstyle
from cxrbatch.training.preparation import Prepared, prepare
from cxrbatch.training.progress import Show
from cxrbatch.training.recipes import Optimiser, Phase, Recipe, load_recipe
from cxrbatch.training.schedules import rate_of, watch_plateau

__all__ = ["train"]

_ALL = 2_000_000_000  # bytes: activations are tens of megabytes, and a step has hundreds of them
_GRADIENT_NORM = 5.0  # longer gradients are cut: one bad batch does not undo an epoch
_WORKING = "training"  # folder in the bundle for all that is not the bundle


def train(
    recipe: str | Path,
    data: Path,
    out: Path,
    *,
    limit: int | None = None,
    epochs: int | None = None,
    resume: bool = True,
    without_sources: Sequence[str] = (),
) -> None:
    """Train by a recipe (a shipped name or a TOML file) on the labelled films in `data`, into the bundle `out`.

    `limit` keeps about so many films of each split and `epochs` is the most of each phase: for trying out.
    `without_sources` leaves hospitals' films out of training, for leave-one-source-out. A run that was killed goes
    on after its last whole epoch, unless `resume` is False. `out`/training holds the metrics (JSONL), curves and
    class grid (PNG), the list of unreadable files and the checkpoint.
    Raises Fatal: see `load_recipe` and `prepare`; or when the loss is no longer a number.
    """
    keep_freed_memory(_ALL, _ALL, 1 << 28)
    plan = load_recipe(recipe)
    if epochs is not None:
        plan = replace(plan, phases=tuple(replace(p, epochs=min(p.epochs, epochs)) for p in plan.phases))
    work = out / _WORKING
    work.mkdir(parents=True, exist_ok=True)
    films = prepare(plan, data, limit, without_sources)
    unreadable = work / "unreadable.txt"
    unreadable.write_text("".join(f"{f.path}: {why}\n" for f, why in films.unreadable))
    if films.unreadable:
        print(f"{len(films.unreadable)} file(s) can't be read and are left out: see {unreadable}")
    if plan.class_grid:
        plots.plot_class_grid(films, work / f"{plan.role}-class-grid.png")
    run = _Run(plan, films, work, resume)
    run.finish()
    normal = run.mean.flatten().tolist(), run.std.flatten().tolist()
    draft = StageDraft(
        role=plan.role,
        architecture=plan.architecture,
        channels=plan.channels,
        classes=films.classes,
        plane=plan.plane,
        mean=tuple(normal[0]),
        std=tuple(normal[1]),
        state=run.best_state(),
        training={
            "recipe": plan.name,
            "recipe_sha256": plan.sha256,
            "data_sha256": films.data_sha256,
            "films": {"train": len(films.train), "val": len(films.val)},
            "epochs": run.progress.epoch,
            "kept_epoch": run.progress.best_epoch if plan.keep == "best" else run.progress.epoch - 1,
            "limit": limit,
            "without_sources": list(without_sources),
            "held_out": {"share": plan.validation_share, "seed": plan.seed} if films.held_out else None,
        },
    )
    write_stage(out, draft)


class _Run:
    """The state of a training run, and its loop over epochs."""

    def __init__(self, recipe: Recipe, films: Prepared, work: Path, resume: bool) -> None:
        self.recipe, self.films, self.work = recipe, films, work
        torch.manual_seed(recipe.seed)
        self.net = start_network(recipe.architecture, recipe.channels, films.outputs, recipe.pretrained)
        self.net = self.net.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.net)
        self.best = copy.deepcopy(self.net)
        self.mean, self.std = _normalisation(recipe, films)
        self.progress = Progress(recipe.sha256, films.data_sha256, [phase.epochs for phase in recipe.phases])
        self.checkpoint = work / f"{recipe.role}-checkpoint.safetensors"
        self._saved: dict[str, Tensor] | None = None
        if resume and self.checkpoint.is_file():
            found, tensors = load_checkpoint(self.checkpoint)
            if found.same_run(self.progress):
                self.progress, self._saved = found, tensors
                restore(tensors, self._networks(), None)
            else:
                print(f"{self.checkpoint} is of another recipe, other films or other --epochs: training starts anew.")

    def _networks(self) -> dict[str, nn.Module]:
        return {"net": self.net, "averaged": self.averaged, "best": self.best}

    def best_state(self) -> dict[str, Tensor]:
        """The weights that the recipe keeps."""
        net = self.best if self.recipe.keep == "best" else self._judged()
        return {key: value.detach() for key, value in net.state_dict().items()}

    def _judged(self) -> FeatureNetwork:
        return self.averaged if self.recipe.average else self.net

    def finish(self) -> None:
        """All epochs that are not done yet."""
        first = 0
        with Show(self.recipe.epochs, self.progress.epoch) as show:
            for phase in self.recipe.phases:
                last = first + phase.epochs
                if self.progress.epoch < last:
                    self._phase(phase, first, last, show)
                first = last

    def _phase(self, phase: Phase, first: int, last: int, show: Show) -> None:
        freeze(self.net, phase.frozen)
        optimiser = _optimiser(self.recipe.optimiser, self.net)
        if self._saved is not None and self.progress.epoch > first:
            restore(self._saved, self._networks(), optimiser)
        self._saved = None
        if self.progress.epoch == first:
            self.progress.rate_share, self.progress.waited, self.progress.plateau_loss = 1.0, 0, math.inf
        for epoch in range(self.progress.epoch, last):
            started = time.monotonic()
            torch.manual_seed(self.recipe.seed * 100_003 + epoch)
            loss, accuracy, rate = self._epoch(phase, epoch, first, last, optimiser, show)
            val_loss, val_accuracy = self._validate(phase)
            if not math.isfinite(val_loss):
                raise self._diverged(f"loss on validation is {val_loss} after", epoch)
            watch_plateau(self.recipe.schedule, self.progress, val_loss)
            entry = {
                "epoch": epoch,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "rate": rate,
                "seconds": round(time.monotonic() - started, 1),
            }
            better = val_loss < self.progress.best_loss
            if better:
                self.progress.best_loss, self.progress.best_epoch = val_loss, epoch
                self.best.load_state_dict(self._judged().state_dict())
            self.progress.epoch = epoch + 1
            self.progress.history.append(entry)
            save_checkpoint(self.checkpoint, self.progress, self._networks(), optimiser)
            lines = "".join(json.dumps(e) + "\n" for e in self.progress.history)
            (self.work / f"{self.recipe.role}-metrics.jsonl").write_text(lines)
            plots.plot_curves(self.progress.history, self.work / f"{self.recipe.role}-curves.png")
            show.epoch(entry, better and self.recipe.keep == "best")

    def _epoch(
        self, phase: Phase, epoch: int, first: int, last: int, optimiser: torch.optim.Optimizer, show: Show
    ) -> tuple[float, float, float]:
        """One pass; (mean loss, accuracy, last rate). Raises Fatal at a loss that is not finite."""
        recipe = self.recipe
        spec = replace(recipe.plane, size=phase.size or recipe.plane.size)
        order = _order(recipe, phase, self.films, epoch)
        films = EpochFilms(
            self.films.train_pictures, self.films.train_labels, order, spec, recipe.augmentation, (recipe.seed, epoch)
        )
        steps = math.ceil(len(order) / recipe.batch)
        self.net.train()
        freeze(self.net, phase.frozen)
        losses, right, rate, seen = 0.0, 0, 0.0, 0
        base = phase.rate or recipe.optimiser.rate
        for step, (planes, labels) in enumerate(batches(films, recipe.batch)):
            rate = rate_of(
                recipe.schedule, base, epoch - first, (epoch - first) * steps + step, (last - first) * steps,
                self.progress.rate_share,
            )  # fmt: skip
            for group in optimiser.param_groups:
                group["lr"] = rate
            x = self._normal(on_grid(planes, recipe.augmentation, recipe.channels))
            x, target = mixup(x, target_of(labels, self.films.outputs), recipe.mixup)
            with mixstyle(self.net, recipe.mixstyle):
                logits, _ = self.net(x)
            loss = loss_of(logits, target, recipe.label_smoothing)
            if not torch.isfinite(loss):
                raise self._diverged(f"loss is {loss.item()} at", epoch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), _GRADIENT_NORM)
            optimiser.step()
            self.progress.step += 1
            _average(self.averaged, self.net, recipe.average, self.progress.step)
            losses += loss.item() * len(labels)
            right += int((guess_of(logits) == labels).sum())
            seen += len(labels)
            show.step(epoch, step + 1, steps, losses / seen)
        return losses / seen, right / seen, rate

    def _diverged(self, what: str, epoch: int) -> Fatal:
        return Fatal(
            f"The {what} step {self.progress.step} (epoch {epoch + 1}): training stopped; "
            "the last whole epoch is kept. A lower rate usually helps."
        )

    def _normal(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _validate(self, phase: Phase) -> tuple[float, float]:
        """Loss and accuracy on validation, as inference would see the films, at the phase's size."""
        net = self._judged().eval()
        spec = replace(self.recipe.plane, size=phase.size or self.recipe.plane.size)
        plain = replace(self.recipe.augmentation, kind="none")
        losses, right = 0.0, 0
        for planes, labels in fixed_batches(self.films.val_pictures, self.films.val_labels, spec, self.recipe.batch):
            logits, _ = net(self._normal(on_grid(planes, plain, self.recipe.channels)))
            losses += loss_of(logits, target_of(labels, self.films.outputs), 0.0).item() * len(labels)
            right += int((guess_of(logits) == labels).sum())
        return losses / len(self.films.val_labels), right / len(self.films.val_labels)


def _normalisation(recipe: Recipe, films: Prepared) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x / 255, (channels, 1, 1) each; films are grey, so channels are alike."""
    mean, std = 0.5, 0.5
    if recipe.normalise == "dataset":
        planes = fixed_batches(films.train_pictures, films.train_labels, recipe.plane, 64)
        moments = torch.tensor([[x.double().mean(), x.double().square().mean()] for x, _ in planes]) / 255
        mean = float(moments[:, 0].mean())
        std = max(1e-3, math.sqrt(max(0.0, float(moments[:, 1].mean()) / 255 - mean**2)))
    ones = torch.ones(recipe.channels, 1, 1)
    return ones * mean, ones * std


def _optimiser(wanted: Optimiser, net: nn.Module) -> torch.optim.Optimizer:
    learning = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": wanted.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, wanted.rate, wanted.momentum),
        "adam": lambda: torch.optim.Adam(groups, wanted.rate),
        "adamw": lambda: torch.optim.AdamW(groups, wanted.rate),
    }
    return makers[wanted.name]()


def _order(recipe: Recipe, phase: Phase, films: Prepared, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which film comes when: a shuffle, or a balanced draw with replacement."""
    if recipe.sampling == "shuffle":
        chance = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        return np.fromiter(SubsetRandomSampler(range(len(films.train)), chance), np.int64)
    rng = np.random.default_rng([recipe.seed, epoch, 1])
    power = recipe.source_power if phase.source_power is None else phase.source_power
    chances = balanced_weights(films.train_labels, [f.source for f in films.train], power)
    return rng.choice(len(films.train), recipe.samples or len(films.train), p=chances)


@torch.no_grad()
def _average(averaged: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network; faster in the first steps, when it knows nothing yet."""
    if not decay:
        return
    share = 1 - min(decay, step / (step + 10))
    for slow, fast in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, share)
        else:
            slow.copy_(fast)
