"""The process behind the heat maps of the review: a JSON question a line on stdin, a JSON answer a line on stdout."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from cxrbatch import unexpected
from cxrbatch.errors import Fatal, Rejected
from cxrbatch.unexpected import UnexpectedError

__all__ = ["answer", "main"]


def main() -> None:
    """Answer until stdin closes. What libraries print goes to stderr: stdout holds answers alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    reports: list[UnexpectedError] = []
    unexpected.forward_to(reports.append)
    for line in sys.stdin:
        try:
            said = answer(json.loads(line))
        except ImportError as error:
            said = {"problem": f"{error.name or 'torch'} is not installed."}
        except MemoryError:
            said = {"problem": "there is not enough memory."}
        except (OSError, Rejected, Fatal) as error:  # the file or the bundle
            said = {"problem": f"the file or the bundle cannot be read ({type(error).__name__})."}
        except Exception as error:
            unexpected.report(error)
            said = {"problem": f"making it failed ({type(error).__name__})."}
        if reports:  # stderr is discarded: the review logs and counts them
            said["unexpected"] = list(reports.pop())
            reports.clear()
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The Grad-CAM of the likeliest class, 0..1, for the bundle that made the stored prediction; else {"problem"}."""
    import numpy as np
    import torch

    from cxrbatch.training.datasets import read_decoded
    from cxrbatch.training.gradcam import grad_cam, network_input

    bundle, network = _loaded(question["bundle"])
    if bundle.manifest_sha256 != question["manifest_sha256"].partition(" ")[0]:
        return {"problem": "the bundle that scored this image is not the one of the setting `cascade`."}
    path = Path(question["path"])
    if hashlib.sha256(path.read_bytes()).hexdigest() != question["sha256"]:
        return {"problem": "the file has other bytes than when it was scored."}
    stage = bundle.disease
    spec = stage.model_input
    x = network_input(read_decoded(path, (spec,)).model_inputs[spec][None], stage)
    with torch.inference_mode():
        best = int(network(x)[0].argmax())
    heat = grad_cam(network, x, torch.tensor([best]))[0].double().numpy()
    heat = heat / max(float(heat.max()), 1e-12)
    rows, columns = heat.shape
    return {
        "rows": rows,
        "columns": columns,
        "values": [round(float(value), 4) for value in np.ravel(heat)],
        "label": stage.classes[best],
        "fit": spec.fit,
    }


@lru_cache(maxsize=1)
def _loaded(name: str) -> tuple[Any, Any]:
    from cxrbatch.inference.bundle import load_bundle
    from cxrbatch.training.gradcam import load_network

    bundle = load_bundle(name)
    return bundle, load_network(bundle.disease)


if __name__ == "__main__":
    main()
