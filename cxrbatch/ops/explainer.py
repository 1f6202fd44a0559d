"""What moved the score of an image, for the captures: where PyTorch and the bundle that scored it are at hand."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrbatch.errors import Fatal
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.store.reported import Reported

if TYPE_CHECKING:
    from cxrbatch.types import ModelInputSpec

__all__ = ["Explainer"]

_EXACT = " exact"


class Explainer:
    """Called with a file's bytes and what was said of it: a map (h, w), 0..1, over the whole image, or None.

    May be called from several threads. The network is loaded at the first call that needs it.
    """

    def __init__(self, cascade: str, limits: Limits) -> None:
        self._cascade, self._limits = cascade, limits
        self._lock = threading.Lock()
        self._bundle: Bundle | None = None
        self._network: Any = None
        self._failed = False

    def __call__(self, data: bytes, reported: Reported) -> NDArray[np.float32] | None:
        with self._lock:
            if not self._ready():
                return None
            assert self._bundle is not None
            stage = self._bundle.disease
            same = reported.manifest_sha256.removesuffix(_EXACT) == self._bundle.manifest_sha256
            if not same or reported.label not in stage.classes:
                return None
            return self._map(data, reported)

    def _ready(self) -> bool:
        if self._network is None and not self._failed:
            try:
                from cxrbatch.training.gradcam import load_network

                self._bundle = load_bundle(self._cascade)
                self._network = load_network(self._bundle.disease)
            except (ImportError, Fatal):
                self._failed = True
        return not self._failed

    def _map(self, data: bytes, reported: Reported) -> NDArray[np.float32]:
        import torch

        from cxrbatch.training.gradcam import grad_cam, network_input

        assert self._bundle is not None
        stage = self._bundle.disease
        exact = reported.manifest_sha256.endswith(_EXACT)
        decoded = decode_bytes(data, (stage.model_input,), self._limits, Identifiers("drop"), exact)
        x = network_input(decoded.model_inputs[stage.model_input][None], stage)
        cam = grad_cam(self._network, x, torch.tensor([stage.classes.index(reported.label)]))[0].numpy()
        heat = cam / max(float(cam.max()), 1e-12)
        return _over_the_image(heat.astype(np.float32), stage.model_input, decoded.facts.rows, decoded.facts.columns)


def _over_the_image(heat: NDArray[np.float32], spec: ModelInputSpec, rows: int, columns: int) -> NDArray[np.float32]:
    """A map of the square model input (h, w) -> of the image alone, without the padding."""
    square = np.asarray(Image.fromarray(heat).resize((spec.size, spec.size), Image.Resampling.BICUBIC)).clip(0, 1)
    if spec.fit == "stretch":
        return square
    height, width = (max(1, round(spec.size * side / max(rows, columns))) for side in (rows, columns))
    top, left = (spec.size - height) // 2, (spec.size - width) // 2
    return square[top : top + height, left : left + width]
