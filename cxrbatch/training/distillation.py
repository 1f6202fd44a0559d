"""Distillation: a network starts as a bundle's and learns its logits instead of labels (Hinton et al. 2015).

It is for networks that compute the same in less time: the student has the tensors of its teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.inference.engines.networks import FeatureNetwork, build_network, load_state, read_state
from cxrbatch.inference.model_spec import ModelSpec
from cxrbatch.training.backbones import join_other
from cxrbatch.training.recipes import Recipe

__all__ = ["Teacher"]


class Teacher:
    """A bundle's network of the recipe's role, with the `other` output where it has one."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], outputs: int, device: torch.device) -> None:
        """`recipe.pretrained` is "bundle:NAME". Raises Fatal where that has other classes or outputs."""
        bundle = load_bundle(recipe.pretrained.removeprefix("bundle:"))
        stage: ModelSpec | None = bundle.gate if recipe.role == "gate" else bundle.disease
        if stage is None:
            raise Fatal(f"The bundle {bundle.path} has no gate that could teach one.")
        self.sha256 = stage.sha256  # another teacher makes another run
        self._state = read_state(stage.weights)
        if stage.other is not None:
            bias = torch.tensor([stage.other.bias])
            self._state = join_other(self._state, torch.from_numpy(stage.other.weight), bias)
        self._channels, self._outputs = stage.channels, len(stage.classes) + (stage.other is not None)
        same_classes = recipe.role == "gate" or stage.classes == classes
        if (self._channels, self._outputs) != (recipe.channels, outputs) or not same_classes:
            raise Fatal(
                f"The {recipe.role} model of {bundle.path} ({', '.join(stage.classes)}) has other classes, outputs or "
                "channels than the recipe: it can't teach this one."
            )
        self._net = self.student(stage.architecture).eval().to(device).to(memory_format=torch.channels_last)
        self._mean, self._std = (torch.tensor(of, device=device).view(-1, 1, 1) for of in (stage.mean, stage.std))

    def student(self, architecture: str) -> FeatureNetwork:
        """A network with the teacher's tensors."""
        net = build_network(architecture, self._channels, self._outputs)
        try:
            load_state(net, {key: tensor.clone() for key, tensor in self._state.items()})
        except RuntimeError:
            raise Fatal(f"The teacher's tensors are not those of a {architecture}.") from None
        return net

    def logits(self, images: Tensor) -> Tensor:
        """(n, outputs) float32 of images (n, channels, size, size) in 0..1."""
        with torch.no_grad():
            x = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
            logits: Tensor = self._net(x)[0]
        return logits
