"""Files of a run: a full disk is a sentence and keeps what was there, and two processes do not mix what they write."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cxrbatch.errors import Fatal
from cxrbatch.training.bundle_writer import changing
from cxrbatch.training.calibrate import calibrate
from cxrbatch.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from cxrbatch.training.files import locked
from cxrbatch.training.fit import train
from factories import make_bundle
from training_images import locked_by_another, make_folder, write_recipe


def test_a_disk_that_is_full_is_a_sentence_and_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    net, file = nn.Linear(100, 10), tmp_path / "checkpoint.safetensors"
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    save_checkpoint(file, Progress("a", "b", epoch=1), {"net": net}, optimiser)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Fatal, match=r"checkpoint.safetensors cannot be written \(File too large\)"):
            save_checkpoint(file, Progress("a", "b", epoch=2), {"net": net}, optimiser)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(file)[0].epoch == 1 and os.listdir(tmp_path) == [file.name]


def test_one_process_at_a_time_trains_a_stage_or_changes_a_bundle(tmp_path: Path) -> None:
    data, recipe = make_folder(tmp_path / "data", counts={"train": 2, "val": 1}), write_recipe(tmp_path / "r.toml")
    bundle = make_bundle(tmp_path / "bundle", with_gate=False)
    lock = tmp_path / "out" / "training" / "disease.lock"
    with locked_by_another(lock), pytest.raises(Fatal, match="Another process trains into"):
        train(recipe, tmp_path / "no images yet", tmp_path / "out")  # it is said before images are loaded
    with locked_by_another(bundle), pytest.raises(Fatal, match="Another process changes the bundle"):
        calibrate(bundle, data)
    with locked(lock, "held by one that was killed"):
        pass


def test_a_training_that_has_to_wait_for_its_bundle_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wait() -> None:
        with changing(tmp_path, wait=True):
            done.set()

    done, said, waiting = threading.Event(), "", threading.Thread(target=wait)
    with locked_by_another(tmp_path):
        waiting.start()
        for _ in range(1000):
            if said := capsys.readouterr().out:
                break
            time.sleep(0.01)
        assert not done.is_set()
    waiting.join(10)
    assert said == f"Another process changes the bundle {tmp_path}: waiting until it is done.\n" and done.is_set()


def test_a_file_whose_name_is_no_utf_8_is_listed_as_unreadable(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", counts={"train": 2, "val": 1})
    Path(os.fsdecode(os.fsencode(data / "train/SICK") + b"/\xff.png")).write_bytes(b"no image")
    recipe = write_recipe(tmp_path / "r.toml", ("channels = 1", 'channels = 1\npretrained = "/nowhere"'))
    with pytest.raises(Fatal, match="pretrained weights /nowhere do not exist"):
        train(recipe, data, tmp_path / "out")
    assert b"SICK/\xff.png: " in (tmp_path / "out/training/unreadable.txt").read_bytes()
