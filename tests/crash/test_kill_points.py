"""kill -9 at each failpoint of the daemon (cxrbatch/failpoints.py), then a normal run: nothing is lost or doubled."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cxrbatch
from dicom_results import OUTBOX_POINTS
from watchers import CRASH_N, Place

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]

POINTS = [
    "start.locked",
    "start.run_begun",
    "start.key_written",
    "walk.offers",
    "offer.before_commit",
    "offer.committed",
    "walk.ended",
    "claim.before_commit",
    "claim.committed",
    "worker.given",
    "worker.decoded",
    "pipeline.decoded",
    "pipeline.batched",
    "pipeline.scored",
    "record.begun",
    "record.images",
    "record.predictions",
    "record.files",
    "record.before_commit",
    "record.committed",
    "renew.before_commit",
    "renew.committed",
    "missing.before_commit",
    "missing.committed",
    "release.before_commit",
]
RECEIVER_POINTS = [f"receiver.{what}" for what in ("received", "written", "synced", "renamed", "stored")]
REVIEW_POINTS = [f"review.{what}" for what in ("written", "before_commit", "committed")]  # test_review_browser.py
OCCURRENCES = (1, 2, 3, 4, 5) if CRASH_N >= 100 else (1, 2)
EVERY = [
    (point, occurrence, kind)
    for point, occurrence, kind in itertools.product(POINTS, OCCURRENCES, ("sqlite", "postgres"))
    if occurrence == 1 or not point.startswith("start")  # a daemon starts once
]
SHARE = [("claim.committed", 1, "sqlite"), ("record.before_commit", 2, "sqlite"), ("record.committed", 1, "postgres")]


def test_the_list_is_complete() -> None:
    package = Path(cxrbatch.__file__).parent
    named = {name for file in package.rglob("*.py") for name in re.findall(r'failpoint\("(.+?)"\)', file.read_text())}
    assert named == {
        *POINTS,
        *RECEIVER_POINTS,
        *REVIEW_POINTS,
        *OUTBOX_POINTS,
    }  # test_send.py kills at those of the outbox


@pytest.mark.parametrize(("point", "occurrence", "kind"), EVERY if CRASH_N else SHARE)
def test_kill_at(
    new_place: Callable[[str], Place],
    undisturbed: dict[str, tuple[Any, ...]],
    point: str,
    occurrence: int,
    kind: str,
) -> None:
    place = new_place(kind)
    env = {"CXRBATCH_FAILPOINT": f"{point}:{occurrence}", "CXRBATCH_TRUNCATED_TRIES": "1", "CXRBATCH_BATCH_SIZE": "2"}
    if kind == "postgres":
        env["CXRBATCH_LEASE_S"] = "2"  # the dead daemon's leases must expire before its files are taken over
    expected = undisturbed
    if point.startswith("worker"):  # every worker dies at its n-th file: a few files are enough
        expected = {name: undisturbed[name] for name in ("0/0.png", "1/1.png", "2/2.png", "0/3.png", "junk.dcm")}
        for name in undisturbed.keys() - expected.keys():
            (place.incoming / name).unlink()
    gone = place.incoming / "gone.png"
    if point.startswith("missing"):
        gone.write_bytes(b"once upon a time")
        assert place.run("--once", CXRBATCH_TRUNCATED_TRIES="1") == 3
        gone.unlink()
    if point.startswith("worker"):  # tried again after this daemon has ended
        env |= {"CXRBATCH_RETRY_FIRST_S": "600", "CXRBATCH_RETRY_MOST_S": "600"}
    if point.startswith("renew"):
        env |= {"CXRBATCH_LEASE_S": "2", "TEST_SLOW_S": "1"}
    code = place.run("--once", **env)
    reached = code == -9 or point.startswith("worker")
    assert reached or code in (0, 3)  # a point may come less often than `occurrence`
    if occurrence == 1 and not point.startswith("renew"):
        assert reached, point
    place.no_orphans()
    if not reached:
        place.check(expected)
        return
    if point.startswith("worker") and occurrence == 1:  # each worker is killed at its first file: no file's fault
        reasons = {row[3] for row in place.rows().values()}
        assert "decode_interrupted" in reasons <= {"decode_interrupted", "not_an_image"}
        assert {row[0] for row in place.rows().values() if row[3] == "decode_interrupted"} == {"retry"}
        assert place.run("--reason", "decode_interrupted", command="retry") == 0
    ready = place.log.count(" ready ")
    daemon = place.start(CXRBATCH_TRUNCATED_TRIES="1")  # not --once: that would not wait for leases to run out
    place.wait(lambda: place.log.count(" ready ") > ready and place.rows() == expected, daemon)
    assert place.stop(daemon) == 0
    place.check(expected)
