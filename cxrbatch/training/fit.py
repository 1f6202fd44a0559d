"""Train one network by a recipe and write it into a bundle; `train` runs all steps in order."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cxrbatch.allocator import keep_freed_memory
from cxrbatch.errors import Fatal
from cxrbatch.inference.engines.networks import FeatureNetwork
from cxrbatch.training import plots
from cxrbatch.training.backbones import freeze, split_other, start_network
from cxrbatch.training.batches import EpochImages, as_floats, batches, fixed_batches, normalisation
from cxrbatch.training.bundle_writer import ModelDraft, check_output, write_stage
from cxrbatch.training.checkpoint import Progress, load_checkpoint, restore, save_checkpoint
from cxrbatch.training.datasets import listed_paths
from cxrbatch.training.distillation import Teacher
from cxrbatch.training.files import locked, write_whole
from cxrbatch.training.losses import guess_of, loss_of, mixed_loss, mixup
from cxrbatch.training.mixstyle import mixstyle
from cxrbatch.training.optimisation import make_optimiser, move_average, training_device
from cxrbatch.training.preparation import Prepared, prepare
from cxrbatch.training.progress import Show, what_comes_next
from cxrbatch.training.recipes import Phase, Recipe, load_recipe, shortened
from cxrbatch.training.sampling import epoch_order
from cxrbatch.training.schedules import learning_rate_of, watch_plateau

__all__ = ["train"]

_ALL = 2_000_000_000  # bytes: activations are tens of megabytes, and a step has hundreds of them
_GRADIENT_NORM = 5.0  # gradients are clipped, so that one bad batch does not undo an epoch
_WORKING = "training"  # subfolder for files that are not part of the bundle


def train(
    recipe: str | Path,
    data: Path,
    out: Path,
    *,
    limit: int | None = None,
    epochs: int | None = None,
    resume: bool = True,
    without_sources: Sequence[str] = (),
    without_files: Path | None = None,
    pretrained: str | None = None,
    device: str = "auto",
) -> None:
    """Train by a recipe (a shipped name or a TOML file) on the labelled images in `data`, into the bundle `out`.

    `limit` keeps about so many images of each split, and draws so many an epoch; `epochs` is the most of each phase.
    `without_sources` leaves hospitals' images out of training, for leave-one-source-out; `without_files` those that a
    CSV names, because their labels are known to be wrong. `pretrained` goes before the recipe's. A run that was killed
    goes on after its last whole epoch, unless `resume` is False. `device` is "auto" (a CUDA GPU where there is one),
    "cpu" or "cuda". `out`/training holds the metrics (JSONL), curves and class grid (PNG), the list of unreadable files
    and the checkpoint. A recipe of findings writes `out`/findings.safetensors and no bundle.
    Raises Fatal: see `load_recipe`, `check_output`, `prepare`; or when the loss is no longer a number.
    """
    on = training_device(device)
    keep_freed_memory(_ALL, _ALL, 1 << 28)
    plan = shortened(load_recipe(recipe), epochs, limit)
    if pretrained is not None:
        plan = replace(plan, pretrained=pretrained)
    check_output(out, _WORKING)
    work = out / _WORKING
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / f"{plan.role}.lock", f"Another process trains into {out}: wait for it, or name another folder."):
        images = prepare(plan, data, limit, without_sources, without_files)
        for split, number in images.same_patients.items():
            print(f"{number} image(s) in {split}/ show a patient of train/ (group in manifest.csv): figures flatter.")
        unreadable, listed = work / "unreadable.txt", "".join(f"{f.path}: {why}\n" for f, why in images.unreadable)
        unreadable.write_text(listed, "utf-8", "surrogateescape")  # names of files are bytes
        if images.unreadable:
            print(f"{len(images.unreadable)} file(s) can't be read and are left out: see {unreadable}")
        if plan.class_grid:
            plots.plot_class_grid(images, work / f"{plan.role}-class-grid.png")
        run = _Run(plan, images, work, resume, on, limit)
        run.finish()
    if plan.role == "findings":
        write_whole(out / "findings.safetensors", save(run.best_state()))
        print(f"The weights are in {out / 'findings.safetensors'}: give them to another recipe with --pretrained.")
        return
    state, other = split_other(run.best_state(), len(images.classes)) if plan.other else (run.best_state(), None)
    draft = ModelDraft(
        role=plan.role,
        architecture=plan.architecture,
        channels=plan.channels,
        classes=images.classes,
        model_input=plan.model_input,
        mean=tuple(run.mean.flatten().tolist()),
        std=tuple(run.std.flatten().tolist()),
        state=state,
        other=other,
        training={
            "recipe": plan.name,
            "recipe_sha256": plan.sha256,
            "data_sha256": images.data_sha256,
            "images": {"train": len(images.train), "val": len(images.val)},
            "epochs": run.progress.epoch,
            "kept_epoch": run.progress.best_epoch if plan.keep == "best" else run.progress.epoch - 1,
            "pretrained": Path(plan.pretrained).name,
            "limit": limit,
            "without_sources": list(without_sources),
            "without_files": 0 if without_files is None else len(listed_paths(without_files)),
            "other": plan.other,
            "labels": {name: list(spellings) for name, spellings in plan.classes.items()},
            "partial": [{"labels": list(one.labels), "classes": list(one.classes)} for one in plan.partial],
            "data": list(plan.data),
            "device": str(on),
            "held_out": images.held_out,
        },
    )
    roles = write_stage(out, draft, version=plan.version, licence=plan.licence)
    print(what_comes_next(out, data, roles))


class _Run:
    """The state of a training run, and the loop over its epochs."""

    def __init__(
        self, recipe: Recipe, images: Prepared, work: Path, resume: bool, device: torch.device, limit: int | None
    ) -> None:
        self.recipe, self.images, self.work, self.device = recipe, images, work, device
        self.targets, self.smoothing = torch.from_numpy(images.targets), torch.from_numpy(images.smoothing)
        torch.manual_seed(recipe.seed)
        self.teacher: Teacher | None = None
        if recipe.distillation:
            self.teacher = Teacher(recipe, images.classes, images.outputs, device)
            self.net = self.teacher.student(recipe.architecture)
        else:
            self.net = start_network(recipe.architecture, recipe.channels, images.outputs, recipe.pretrained)
        self.net = self.net.to(device).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.net)
        self.best = copy.deepcopy(self.net)
        self.mean, self.std = normalisation(recipe, images)
        start = recipe.pretrained if self.teacher is None else f"{recipe.pretrained} {self.teacher.sha256}"
        epochs = [phase.epochs for phase in recipe.phases]
        self.progress = Progress(recipe.sha256, images.data_sha256, start, epochs, limit)
        self.checkpoint = work / f"{recipe.role}-checkpoint.safetensors"
        self._saved: dict[str, Tensor] | None = None
        if resume and self.checkpoint.is_file():
            found, tensors = load_checkpoint(self.checkpoint)
            if found.same_run(self.progress):
                self.progress, self._saved = found, tensors
                restore(tensors, self._networks(), None)
            else:
                print(f"{self.checkpoint} is of another recipe, other images or other options: training starts anew.")

    def _networks(self) -> dict[str, nn.Module]:
        return {"net": self.net, "averaged": self.averaged, "best": self.best}

    def best_state(self) -> dict[str, Tensor]:
        """The weights that the recipe keeps."""
        net = self.best if self.recipe.keep == "best" else self._judged()
        return {key: value.detach() for key, value in net.state_dict().items()}

    def _judged(self) -> FeatureNetwork:
        return self.averaged if self.recipe.average else self.net

    def finish(self) -> None:
        """Train the remaining epochs."""
        first = 0
        with Show(self.recipe.epochs, self.progress.epoch) as show:
            for phase in self.recipe.phases:
                last = first + phase.epochs
                if self.progress.epoch < last:
                    self._phase(phase, first, last, show)
                first = last

    def _phase(self, phase: Phase, first: int, last: int, show: Show) -> None:
        freeze(self.net, phase.frozen)
        optimiser = make_optimiser(self.recipe.optimiser, self.net)
        if self._saved is not None and self.progress.epoch > first:
            restore(self._saved, self._networks(), optimiser)
        self._saved = None
        if self.progress.epoch == first:
            self.progress.rate_share, self.progress.waited, self.progress.plateau_loss = 1.0, 0, math.inf
        for epoch in range(self.progress.epoch, last):
            started = time.monotonic()
            torch.manual_seed(self.recipe.seed * 100_003 + epoch)
            loss, accuracy, learning_rate = self._epoch(phase, epoch, first, last, optimiser, show)
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
                "learning_rate": learning_rate,
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
        """Train one epoch; returns (mean loss, accuracy, last rate). Raises Fatal if the loss is not finite."""
        recipe = self.recipe
        spec = replace(recipe.model_input, size=phase.size or recipe.model_input.size)
        order = epoch_order(recipe, phase, self.images, epoch)
        images = EpochImages(
            self.images.train_arrays, self.images.train_labels, order, spec, recipe.augmentation, (recipe.seed, epoch)
        )
        steps = math.ceil(len(order) / recipe.batch)
        self.net.train(self.teacher is None)  # a student has no dropout, and its batch-norm statistics stay
        freeze(self.net, phase.frozen)
        losses, right, learning_rate, seen = 0.0, 0.0, 0.0, 0
        base = phase.learning_rate or recipe.optimiser.learning_rate
        for step, (model_inputs, labels) in enumerate(batches(images, recipe.batch)):
            learning_rate = learning_rate_of(
                recipe.schedule, base, epoch - first, (epoch - first) * steps + step, (last - first) * steps,
                self.progress.rate_share,
            )  # fmt: skip
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
            grey = as_floats(model_inputs.to(self.device), recipe.augmentation, recipe.channels)
            x, other, share = mixup(self._normal(grey), recipe.mixup)
            targets, smoothing = self.targets[labels].to(self.device), self.smoothing[labels].to(self.device)
            with mixstyle(self.net, recipe.mixstyle), self._precision():
                logits, _ = self.net(x)
            logits, labels = logits.float(), labels.to(self.device)
            if self.teacher is None:
                loss = mixed_loss(logits, targets, smoothing, other.to(self.device), share, binary=recipe.binary)
            else:
                loss = nn.functional.mse_loss(logits, self.teacher.logits(grey))
            if not torch.isfinite(loss):
                raise self._diverged(f"loss is {loss.item()} at", epoch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), _GRADIENT_NORM)
            optimiser.step()
            self.progress.step += 1
            move_average(self.averaged, self.net, recipe.average, self.progress.step)
            losses += loss.item() * len(labels)
            right += self._right(logits, labels)
            seen += len(labels)
            show.step(epoch, step + 1, steps, losses / seen)
        return losses / seen, right / seen, learning_rate

    def _right(self, logits: Tensor, labels: Tensor) -> float:
        """How many answers are right; of findings, the mean over them."""
        if self.recipe.role == "findings":
            asked = self.targets.to(labels.device)[labels]
            return float(((logits > 0) == (asked > 0)).float().mean(1).sum())
        known = logits[:, : len(self.images.classes)]  # the other output is no answer
        return int((guess_of(known, gate=self.recipe.role == "gate") == labels).sum())

    def _diverged(self, what: str, epoch: int) -> Fatal:
        return Fatal(
            f"The {what} step {self.progress.step} (epoch {epoch + 1}): training stopped; "
            "the last whole epoch is kept. A lower rate usually helps."
        )

    def _normal(self, x: Tensor) -> Tensor:
        mean, std = self.mean.to(x.device), self.std.to(x.device)
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)

    def _precision(self) -> torch.autocast:
        """bfloat16 on a GPU, and nothing changed on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.inference_mode()
    def _validate(self, phase: Phase) -> tuple[float, float]:
        """Loss and accuracy on validation, with the images as inference sees them, at the phase's size."""
        net = self._judged().eval()
        spec = replace(self.recipe.model_input, size=phase.size or self.recipe.model_input.size)
        plain = replace(self.recipe.augmentation, kind="none")
        losses, right = 0.0, 0.0
        images = fixed_batches(self.images.val_arrays, self.images.val_labels, spec, self.recipe.batch)
        for model_inputs, labels in images:
            x = self._normal(as_floats(model_inputs.to(self.device), plain, self.recipe.channels))
            with self._precision():
                logits = net(x)[0].float().cpu()
            loss = loss_of(logits, self.targets[labels], torch.zeros(len(labels)), binary=self.recipe.binary)
            losses += loss.item() * len(labels)
            right += self._right(logits, labels)
        return losses / len(self.images.val_labels), right / len(self.images.val_labels)
