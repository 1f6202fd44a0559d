"""The heat map of the review: from a process that loads torch, beside a web process that never does."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrbatch.errors import Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.review.overlay_process import HeatMaps
from cxrbatch.samples.phantom import colour_pattern


def test_readers_who_wait_for_heat_maps_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, loaded = HeatMaps("default"), threading.Event()
    monkeypatch.setattr(maps, "_ask", lambda question: {"rows": 1} if loaded.wait(100) else {})
    with ThreadPoolExecutor(40) as threads:
        asked = [threads.submit(maps.heat_map, "film.png", str(number), "") for number in range(40)]
        answers = as_completed(asked, timeout=30)
        try:
            refused = [next(answers) for _ in range(32)]
        finally:
            loaded.set()
    assert all("try again" in str(one.exception()) for one in refused)
    assert [one.result() for one in asked if one not in refused] == [{"rows": 1}] * 8


def test_the_heat_map_comes_from_its_own_process_and_is_kept(tmp_path: Path) -> None:
    bundle, path = load_bundle("default"), tmp_path / "film.png"
    side = -(-bundle.disease.model_input.size // 32)  # of the last feature map: five layers halve it, rounding up
    Image.fromarray(colour_pattern(seed=3)).convert("L").save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    maps = HeatMaps("default")
    try:
        made = maps.heat_map(str(path), digest, bundle.manifest_sha256)
        assert made["label"] in bundle.disease.classes and (made["rows"], made["columns"]) == (side, side)
        values = np.array(made["values"])
        assert len(values) == side**2 and values.min() >= 0 and values.max() == 1
        path.unlink()
        assert maps.heat_map(str(path), digest, bundle.manifest_sha256) == made
        with pytest.raises(Fatal, match="not available"):
            maps.heat_map(str(path), "0" * 64, bundle.manifest_sha256)
    finally:
        maps.close()
