"""Drift: quiet where nothing changed, loud where something did; the command and its bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.decode import Identifiers, Limits, decode_bytes
from cxrbatch.inference.bundle import Bundle, load_bundle
from cxrbatch.ops import drift_statistics
from cxrbatch.ops.drift import parse_span
from cxrbatch.ops.drift_comparison import measure_drift
from cxrbatch.ops.drift_statistics import Rows, compare_days, compare_reference, wilson
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.store import ReviewAction, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.drift import Span, accept_days, accepted_days, read_outcomes, read_overrides
from cxrbatch.store.review_schema import round_items
from cxrbatch.store.rounds import NewRound, create_round
from cxrbatch.store.work_list import Filters
from cxrbatch.training.reference import Reference, histogram, read_reference, reference_block
from cxrbatch.types import Decision
from store_images import LABELS, begin, reject, review, scored_file

DAYS, WINDOW_DAYS, PER_DAY = 60, 10, 45.0
MIX = np.array([0.5, 0.15, 0.25, 0.1])


def days(
    chance: np.random.Generator,
    number: int,
    *,
    first: int = 0,
    mix: Any = MIX,
    spread: float = 30.0,
    tired: float = 0.0,
    not_chest: float = 0.03,
    gamma: float = 1.0,
) -> Rows:
    """A site whose days differ (the more, the smaller `spread`); `tired` moves confidence and ood_score."""
    size = chance.poisson(PER_DAY, number)
    day = np.repeat(np.arange(number), size)
    bounds = np.cumsum(chance.dirichlet(np.asarray(mix) * spread, number), 1)[day]
    code = (chance.random(len(day))[:, None] > bounds).sum(1).clip(0, 3)
    mood = chance.normal(0, 0.8 / np.sqrt(spread), number)[day]
    label = np.array(LABELS, dtype="<U12")[code]
    refused = chance.random(len(day)) < not_chest
    label[refused] = np.where(day[refused] % 5, "NOT_CHEST", "NOT_FRONTAL")
    label[chance.random(len(day)) < 0.05] = ""
    chest = ~np.isin(label, ["", "NOT_CHEST", "NOT_FRONTAL"])
    confidence = 0.25 + 0.75 / (1 + np.exp(-chance.normal(1.5 - tired, 1.0, len(day)) - mood))
    ood = np.exp(chance.normal(-0.4 + 0.3 * tired, 0.3, len(day)) - 0.5 * mood)
    grey = np.clip(chance.normal(131, 22, len(day)) + 22 * mood, 1, 254)  # as measured on real images
    nothing = np.nan
    return Rows(
        day + first,
        label,
        np.where(chest, confidence, nothing),
        np.where(chest, ood, nothing),
        np.where(chest, 255 * (grey / 255) ** gamma, nothing),
        np.where(label == "", nothing, np.where(refused, 0.02, 0.99)),
    )


def reference(rows: Rows) -> Reference:
    scored = rows.label != ""
    block = reference_block(
        rows.label[scored].tolist(),
        ["reported"] * int(scored.sum()),
        np.nan_to_num(rows.confidence[scored]).tolist(),
        [None if np.isnan(x) else x for x in rows.ood_score[scored].tolist()],
        rows.gate_probability[scored].tolist(),
        rows.grey_mean[scored].tolist(),
        set_name="made up",
    )
    found = read_reference({"reference": json.loads(json.dumps(block))})
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):  # small matrices, and machines that are busy
        yield


def test_of_a_thousand_windows_without_a_change_about_ten_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose days differ and sites whose days are alike, against accepted days and against a reference."""
    monkeypatch.setattr(drift_statistics, "_RESAMPLES", 400)
    chance = np.random.default_rng(11)
    alarms = 0
    for spread in (30.0, 3000.0):
        made_for = reference(days(chance, 2000, spread=spread))
        for seed in range(250):
            baseline = days(chance, DAYS, spread=spread)
            window = days(chance, WINDOW_DAYS, first=DAYS, spread=spread)
            alarms += any(one.alarming for one in compare_days(window, baseline, seed))
            window = days(chance, 3 * WINDOW_DAYS, spread=spread)
            alarms += any(one.alarming for one in compare_reference(window, made_for, True, seed))
    assert 5 <= alarms <= 20, alarms


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        ({"mix": MIX + np.array([-0.15, 0.15, 0, 0])}, "label_psi"),
        ({"tired": 1.0}, "confidence_ks"),
        ({"tired": 1.0}, "ood_score_ks"),
        ({"not_chest": 0.15}, "gate_rate"),
        ({"gamma": 1.5}, "grey_mean_ks"),
    ],
    ids=["15 points more COVID-19", "less sure", "less like the training data", "other images", "gamma 1.5"],
)
def test_a_change_is_caught_within_500_images(change: dict[str, Any], statistic: str) -> None:
    chance = np.random.default_rng(3)
    baseline = days(chance, DAYS, spread=200)
    window = days(chance, WINDOW_DAYS, first=DAYS, spread=200, **change)
    assert window.scored < 500
    found = {one.name: one for one in compare_days(window, baseline)}
    assert found[statistic].alarming
    made_for = {one.name: one for one in compare_reference(window, reference(baseline), True)}
    assert made_for[statistic].alarming


def test_a_number_that_half_of_the_images_lack_is_not_compared() -> None:
    """As after an upgrade: images from before have no mean grey. The others are compared, and the share is of days."""
    chance = np.random.default_rng(4)
    baseline, window = days(chance, DAYS), days(chance, WINDOW_DAYS, first=DAYS, gamma=1.5)
    for share, is_compared in ((0.45, True), (0.55, False)):
        missing = np.where(baseline.day < share * DAYS, np.nan, baseline.grey_mean)
        found = {one.name: one for one in compare_days(window, replace(baseline, grey_mean=missing))}
        assert ("grey_mean_ks" in found) == is_compared
        assert "confidence_ks" in found
    without = replace(reference(baseline), grey_mean=None)
    assert "grey_mean_ks" not in {one.name for one in compare_reference(window, without, True)}


def test_one_refused_image_is_no_alarm_where_the_reference_has_none() -> None:
    chance = np.random.default_rng(7)
    window = days(chance, WINDOW_DAYS, not_chest=0)
    made_for = reference(days(chance, 20, not_chest=0))
    window.label[np.flatnonzero(window.label != "")[0]] = "NOT_CHEST"
    found = {one.name: one for one in compare_reference(window, made_for, True)}
    assert found["gate_rate"].score > 0 and not found["gate_rate"].alarming


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)  # Brown, Cai, DasGupta 2001
    assert wilson(0, 50)[0] == 0.0 and wilson(50, 50)[1] == 1.0


def test_a_span_in_words() -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    assert parse_span("30d", None, now) == Span(now - timedelta(days=30), now)
    assert parse_span("2026-11-01", "2026-11-02", now).until == datetime(2026, 11, 2, tzinfo=UTC)
    for since, until in (("30", None), ("soon", None), ("2026-11-02", "2026-11-01"), ("1d", "never"),
                         ("0001-01-01T00:00:00+23:00", None), ("1d", "9999-12-31T23:00:00-23:00")):  # fmt: skip
        with pytest.raises(Fatal) as failed:
            parse_span(since, until, now)
        assert failed.value.exit_code == ExitCode.USAGE


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def fill(
    store: Store,
    bundle: Bundle,
    first: int,
    number: int,
    confidence: float,
    now: list[datetime],
    greys: Sequence[float] = (),
) -> None:
    """A day each, 60 images and 2 rejected files."""
    from cxrbatch.ops.setup import identity_of

    run = store.begin_run("{}", identity_of(bundle, False), device="", engine="", host="", version="")
    chance = np.random.default_rng(first)
    for day in range(first, first + number):
        now[0] = NOW - timedelta(days=day, hours=1)
        some = [
            scored_file(
                f"/in/{day}/{k}",
                LABELS[k % 4],
                float(np.clip(chance.normal(confidence, 0.05), 0.3, 1)),
                decision=Decision.REPORTED,
                ood_score=float(chance.normal(0.8, 0.1)),
                facts={"grey_mean": greys[int(chance.integers(len(greys)))]} if greys else {},
            )
            for k in range(60)
        ]
        store.record(run.run_id, run.cascade_id, [*some, reject(f"/in/{day}/a"), reject(f"/in/{day}/b")])


def test_the_command_on_both_stores(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now, bundle = [NOW], load_bundle("default")
    without = replace(bundle, manifest={k: v for k, v in bundle.manifest.items() if k != "reference"})
    recent, before = Span(NOW - timedelta(days=7), NOW), Span(NOW - timedelta(days=30), NOW - timedelta(days=7))
    with Store.open(store_url, clock=lambda: now[0]) as store:
        fill(store, bundle, 0, 3, 0.6, now)
        with pytest.raises(Fatal, match="has no reference, and no other days"):
            measure_drift(store, without, False, recent)
        fill(store, bundle, 8, 20, 0.9, now)
        assert accepted_days(store) is None
        accept_days(store, before, 1200)
        drift = measure_drift(store, without, False, recent)
        assert (drift.n, drift.days, drift.baseline_n) == (180, 3, 20 * 60) and not drift.enough
        fill(store, bundle, 3, 3, 0.6, now)
        fill(store, load_bundle("alveoli"), 6, 1, 0.6, now)  # its rejections belong to it, as its scores do
        drift = measure_drift(store, without, False, recent)
        assert drift.enough and drift.alarming == ["confidence_ks"]
        assert measure_drift(store, without, False, replace(before, since=NOW - timedelta(days=17))).alarming == []

    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["--db", store_url, "drift", *options], catch_exceptions=True)

    span = ("--since", recent.since.isoformat(), "--until", recent.until.isoformat())
    shown = run(*span, "--png", "drift.png")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "360 images of 6 day(s)" in shown.output and "drift" in shown.output
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert run(*span, "--png", "drift.png").exit_code == 0
    (tmp_path / "patient.png").write_bytes(b"\x89PNG of a patient")
    refused = run(*span, "--png", "patient.png")
    assert isinstance(refused.exception, Fatal) and "is there already" in str(refused.exception)
    assert (tmp_path / "patient.png").read_bytes() == b"\x89PNG of a patient"
    report = json.loads(run(*span, "--json").stdout)
    assert report["alarm"] and report["images"] == 360
    assert {one["name"] for one in report["statistics"]} >= {
        "label_psi",
        "confidence_ks",
        "ood_score_ks",
        "reject_rate",
    }
    assert report["not_compared"] == {"grey_mean_ks": "not known of these images"}
    assert "not known of these images" in shown.output
    # The newest days are accepted as they are: later ones are compared with them.
    assert "Accepted: 360 images of 6 day(s)" in run(*span, "--accept").output
    assert "the days accepted here hold 0 images outside this span" in run(*span).output
    refused = run("--since", "1h", "--accept")
    assert isinstance(refused.exception, Fatal) and "200 are the least" in str(refused.exception)


def test_files_that_were_moved_count_as_before_and_copies_once(store_url: str) -> None:
    names = [f"{k}.png" for k in range(5)]
    whole = Span(NOW - timedelta(days=1), NOW + timedelta(days=1))
    with Store.open(store_url, clock=lambda: NOW) as store:
        run = begin(store)

        def record(path: str, content: str) -> None:
            store.record(run.run_id, run.cascade_id, [scored_file(path, content=content)])

        def counted() -> int:
            return len(read_outcomes(store, run.cascade_id, whole, 100))

        for name in names:
            record(f"/in/{name}", name)
        record("/in/copy.png", names[0])
        assert counted() == 5
        store.mark_missing(run.run_id, ["/in"], set())
        assert counted() == 0
        for name in names:
            record(f"/arch/{name}", name)
        assert counted() == 5
        record("/arch/copy.png", names[0])
        assert counted() == 5
        for path in ("/out/a", "/out/b"):
            record(path, path)
        record("/out/a", "/out/b")  # overwritten: the copy came before the other one
        assert counted() == 6


def test_moved_files_are_looked_up_by_their_image(tmp_path: Path) -> None:
    """SQLite plans without statistics: an empty store plans like one of a million files."""
    with Store.open(f"sqlite:///{tmp_path / 's.db'}") as store, connect(store.engine) as connection:
        asked: list[tuple[str, Any]] = []
        sa.event.listen(
            store.engine, "before_cursor_execute", lambda _c, _cur, text, values, *_: asked.append((text, values))
        )
        read_outcomes(store, 1, Span(NOW - timedelta(days=1), NOW), 100)
        text, values = asked[-1]
        steps = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)]
    assert any(step.startswith("SEARCH files USING INDEX ix_files_processed_at (") for step in steps), steps
    assert any(step.startswith("SEARCH other USING INDEX ix_files_image_id (") for step in steps), steps
    assert not [step for step in steps if step.startswith("SCAN")], steps


def _mean_greys(gamma: float) -> list[float]:
    """Of images as the decoder reads them: phantoms of many exposures, each with a gamma."""
    chance = np.random.default_rng(1)
    greys: list[float] = []
    for seed in range(40):
        drawn = draw_chest(Chest(rows=96, columns=96, seed=seed)) ** chance.uniform(0.8, 1.2)
        file = io.BytesIO()
        Image.fromarray(np.rint(255 * drawn**gamma).astype(np.uint8)).save(file, "PNG")
        mean = decode_bytes(file.getvalue(), (), Limits(), Identifiers(mode="drop")).facts.grey_mean
        assert mean is not None
        greys.append(mean)
    return greys


def test_another_gamma_is_caught_in_stored_rows_within_500_images(store_url: str) -> None:
    """The answers of the networks stay as they are. Against accepted days, and against the reference of a bundle."""
    now, bundle = [NOW], load_bundle("default")
    usual = _mean_greys(1.0)
    block = dict(bundle.manifest["reference"]) | {"grey_mean": histogram(np.array(usual * 40))}
    known = replace(bundle, manifest=bundle.manifest | {"reference": block})
    lacks = {name: part for name, part in block.items() if name != "grey_mean"}
    before_it = replace(bundle, manifest=bundle.manifest | {"reference": lacks})
    recent, before = Span(NOW - timedelta(days=6), NOW), Span(NOW - timedelta(days=30), NOW - timedelta(days=12))
    with Store.open(store_url, clock=lambda: now[0]) as store:
        fill(store, bundle, 12, 16, 0.9, now, usual)
        fill(store, bundle, 6, 6, 0.9, now, usual)
        fill(store, bundle, 0, 6, 0.9, now, _mean_greys(1.5))
        against = {one.name: one for one in measure_drift(store, known, False, recent).findings}
        assert against["grey_mean_ks"].alarming
        lacking = measure_drift(store, before_it, False, recent)
        assert lacking.not_compared == {"grey_mean_ks": "not in the reference"}
        assert "grey_mean_ks" not in {one.name for one in lacking.findings}
        accept_days(store, before, 16 * 60)
        drift = measure_drift(store, known, False, recent)
        assert (drift.n, drift.baseline_n, drift.alarming) == (360, 16 * 60, ["grey_mean_ks"])
        unchanged = Span(recent.since - timedelta(days=6), recent.since)
        assert measure_drift(store, known, False, unchanged).alarming == []


def test_the_override_rate_is_of_blinded_reads_of_random_rounds_alone(store_url: str) -> None:
    now = [NOW]
    with Store.open(store_url, clock=lambda: now[0]) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"/in/{k}", LABELS[k % 4]) for k in range(12)])
        chosen = {
            "readers": ("dr_a",),
            "reads_per_image": 1,
            "filters": Filters(),
            "size": 10,
            "seed": 1,
            "blinded": True,
        }
        chosen |= {"blinded": True, "stratified": False, "repeat_share": 0.0}
        for name, kept in (("random", "{}"), ("filtered", '{"query": "label=NORMAL"}')):
            number = create_round(store, NewRound(name=name, filter_json=kept, **chosen), "chief")
            with connect(store.engine) as connection:
                items = connection.execute(sa.select(round_items).where(round_items.c.round_id == number)).all()
            for k, item in enumerate(items):
                label = "COVID19" if item.model_label == "NORMAL" else "NORMAL"
                label = label if k < 3 else item.model_label
                review(store, item.image_id, "dr_a", ReviewAction.OVERRIDE, label, blinded=True, round_id=number)
        whole = Span(NOW - timedelta(days=1), NOW + timedelta(days=1))
        assert read_overrides(store, run.cascade_id, whole) == (10, 3)
        assert read_overrides(store, run.cascade_id + 1, whole) == (0, 0)
        assert read_overrides(store, run.cascade_id, replace(whole, until=NOW)) == (0, 0)


@pytest.mark.parametrize(
    "wrong", [{"edges": [0, 1]}, {"edges": [1, 0], "counts": [3]}, {"edges": [0, 1], "counts": [1.5]}, 7]
)
def test_a_reference_that_is_damaged_is_refused(wrong: Any) -> None:
    block = {"n": 3, "labels": {"NORMAL": 3}, "decisions": {}, "confidence": wrong}
    with pytest.raises(ValueError):
        read_reference({"reference": block})
