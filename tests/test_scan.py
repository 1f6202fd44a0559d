"""`cxrbatch scan` as a user runs it: real processes, both databases, one row per file."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cxrbatch.ops.scan import Exports, run_scan
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.housekeeping import prune
from daemon import Arithmetic
from factories import make_bundle
from fork_server import LIMIT_S
from pipelines import Pipeline, image, kill_group
from store_images import begin

LABELS = {"NORMAL", "COVID19", "PNEUMONIA", "TUBERCULOSIS"}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def pipeline(tmp_path: Path, store_url: str, bundle: Path) -> Pipeline:
    return Pipeline(tmp_path, store_url, bundle)


@pytest.fixture
def sqlite_pipeline(tmp_path: Path, bundle: Path) -> Pipeline:
    return Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", bundle)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_one_row_and_a_second_scan_opens_none_of_them(pipeline: Pipeline) -> None:
    folder = pipeline.cwd / "in"
    images = [image(folder / f"{i}.png", i) for i in range(7)]
    (folder / "twin.png").write_bytes(images[0].read_bytes())
    for name, data in {"empty.dcm": b"", "page.dcm": b"<html>no", "cut.png": images[1].read_bytes()[:90]}.items():
        (folder / name).write_bytes(data)

    first = pipeline.run("scan", folder, "--csv", "out.csv")
    assert first.code == 3, first.err
    rows = {Path(row["path"]).name: row for row in read_csv(pipeline.cwd / "out.csv")}
    assert set(rows) == {p.name for p in folder.iterdir()}
    for name, row in rows.items():
        if name in ("empty.dcm", "page.dcm", "cut.png"):
            assert row["state"] == "rejected" and row["reason_code"] and row["reason"].endswith(".")
        else:
            assert row["label"] in LABELS and 0 <= float(row["confidence"]) <= 1 and row["gate_probability"]
    assert rows["twin.png"]["sha256"] == rows["0.png"]["sha256"]
    assert pipeline.ask("SELECT count(*) FROM predictions") == [(7,)], "the same content is scored once"
    assert first.summary["files"] == 11 and first.summary["processed_now"] == 11

    # Proof that nothing is opened: other bytes with the same size and mtime go unnoticed.
    info = images[2].stat()
    images[2].write_bytes(bytes(info.st_size))
    os.utime(images[2], ns=(info.st_atime_ns, info.st_mtime_ns))
    second = pipeline.run("scan", folder, "--csv", "again.csv")
    assert (second.code, second.summary["unchanged"], second.summary["processed_now"]) == (3, 11, 0)
    assert (pipeline.cwd / "again.csv").read_bytes() == (pipeline.cwd / "out.csv").read_bytes()


def test_changed_content_is_a_new_image_and_the_old_one_is_remembered(pipeline: Pipeline) -> None:
    path = image(pipeline.cwd / "in/a.png", 1)
    pipeline.run("scan", "in")
    image(path, 2)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    assert pipeline.run("scan", "in").summary["processed_now"] == 1
    assert pipeline.ask("SELECT count(*) FROM images") == [(2,)]
    assert pipeline.ask("SELECT count(*) FROM files") == [(1,)]
    (event,) = pipeline.ask("SELECT event, old, new FROM audit WHERE event = 'image_changed'")
    assert event[1] != event[2]
    assert "image_changed" in pipeline.run("show", path).out


def test_a_file_that_goes_and_comes_back_keeps_its_row(pipeline: Pipeline) -> None:
    path = image(pipeline.cwd / "in/a.png", 1)
    image(pipeline.cwd / "in/b.png", 2)
    pipeline.run("scan", "in")
    path.rename(pipeline.cwd / "away.png")
    gone = pipeline.run("scan", "in", "--csv", "out.csv")
    assert (gone.summary["files"], gone.summary["missing"], len(read_csv(pipeline.cwd / "out.csv"))) == (1, 1, 1)
    (pipeline.cwd / "away.png").rename(path)
    back = pipeline.run("scan", "in")
    assert (back.summary["files"], back.summary["missing"], back.summary["processed_now"]) == (2, 0, 0)


def test_one_that_goes_while_another_comes_is_missed(sqlite_pipeline: Pipeline) -> None:
    path = image(sqlite_pipeline.cwd / "in/a.png", 1)
    image(sqlite_pipeline.cwd / "in/b.png", 2)
    sqlite_pipeline.run("scan", "in")
    path.rename(path.with_name("c.png"))
    after = sqlite_pipeline.run("scan", "in", "--csv", "out.csv").summary
    assert (after["files"], after["missing"], len(read_csv(sqlite_pipeline.cwd / "out.csv"))) == (2, 1, 2)
    # A file that exists but is excluded now is not missing.
    sqlite_pipeline.run("scan", "in", "--include", "c*")
    assert sorted(sqlite_pipeline.ask("SELECT state FROM files")) == [("done",), ("done",), ("missing",)]


def test_a_share_that_drops_out_makes_nothing_missing(sqlite_pipeline: Pipeline) -> None:
    folder = sqlite_pipeline.cwd / "in"
    image(folder / "a.png", 1)
    sqlite_pipeline.run("scan", "in")
    folder.rename(sqlite_pipeline.cwd / "unmounted")
    folder.mkdir()
    sqlite_pipeline.run("scan", "in")
    assert sqlite_pipeline.ask("SELECT state FROM files") == [("done",)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_finished_and_the_next_scan_goes_on(
    sqlite_pipeline: Pipeline, how: signal.Signals
) -> None:
    folder = sqlite_pipeline.cwd / "in"
    for i in range(1000):
        image(folder / f"{i}.png", i)
    process = sqlite_pipeline.start("scan", folder, "--csv", "out.csv", "--workers", 1, "--batch-size", 4)
    sqlite_pipeline.wait_until(lambda: sqlite_pipeline.rows() >= 10, process)
    os.killpg(process.pid, how)  # as a terminal does: the workers get it too
    out, err = process.communicate(LIMIT_S)
    assert process.returncode == 130, err
    done = sqlite_pipeline.rows()
    assert 10 <= done < 1000 and json.loads(out)["stopped"]
    assert sqlite_pipeline.ask("SELECT DISTINCT state FROM files") == [("done",)], (
        "no good image is blamed for the stop"
    )
    assert len(read_csv(sqlite_pipeline.cwd / "out.csv")) == done
    after = sqlite_pipeline.run("scan", folder, "--limit", 3).summary
    assert (after["files"], after["processed_now"]) == (done + 3, 3)


def test_a_file_that_has_yet_to_settle_holds_up_neither_the_others_nor_the_stop(sqlite_pipeline: Pipeline) -> None:
    os.utime(image(sqlite_pipeline.cwd / "in/old.png", 1), (1, 1))
    os.utime(image(sqlite_pipeline.cwd / "in/unstable.png", 2))
    process = sqlite_pipeline.start("scan", "in", CXRBATCH_QUIET_S="3600", CXRBATCH_RECORD_AGE_S="0.2")
    sqlite_pipeline.wait_until(lambda: sqlite_pipeline.rows() == 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(LIMIT_S)
    assert process.returncode == 130, err
    assert sqlite_pipeline.rows() == 1


@pytest.mark.crash
def test_kill_9_in_the_middle_loses_nothing_and_doubles_nothing(pipeline: Pipeline) -> None:
    folder = pipeline.cwd / "in"
    for i in range(60):
        image(folder / f"{i}.png", i)
    (folder / "twin.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "junk").write_bytes(b"junk")
    for at_least in (1, 20, 40):
        process = pipeline.start("scan", folder)
        pipeline.wait_until(lambda n=at_least: pipeline.rows() >= n, process)  # type: ignore[misc]
        kill_group(process)
    assert pipeline.run("scan", folder, "--csv", "out.csv").code == 3
    rows = read_csv(pipeline.cwd / "out.csv")
    assert sorted(Path(r["path"]).name for r in rows) == sorted(p.name for p in folder.iterdir())
    assert pipeline.ask("SELECT count(*) FROM predictions") == [(60,)]
    assert pipeline.ask("SELECT count(*) FROM scores") == [(240,)]

    undisturbed = Pipeline(pipeline.cwd, f"sqlite:///{pipeline.cwd}/undisturbed.db", pipeline.bundle)
    undisturbed.run("scan", folder, "--csv", "expected.csv")
    numbers = ("label", "decision", "state", "reason_code", "sha256")
    expected = {r["path"]: r for r in read_csv(pipeline.cwd / "expected.csv")}
    for row in rows:
        assert [row[n] for n in numbers] == [expected[row["path"]][n] for n in numbers]
        if row["confidence"]:
            assert float(row["confidence"]) == pytest.approx(float(expected[row["path"]]["confidence"]), abs=1e-5)


def test_a_scan_comes_back_to_a_file_whose_known_content_prune_took_meanwhile(
    tmp_path: Path, store_url: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scanned(*folders: object) -> list[Any]:
        given = {"cascade": str(bundle), "workers": 1, "quiet_s": 0, "id_key_file": str(tmp_path / "key")}
        how: dict[str, Any] = {"reprocess": "none", "limit": None, "dry_run": False, "error_on_empty": False}
        code = run_scan(Settings(db=store_url, **given), list(map(str, folders)), Exports(), quiet=True, **how)
        assert code == 0
        with Store.open(store_url) as store:
            return [(Path(row.path).name, row.state) for row in store.results()]

    monkeypatch.setattr("cxrbatch.ops.scan.open_engine", lambda *_: Arithmetic())
    first = image(tmp_path / "in" / "a.png", 0)
    assert scanned(first.parent) == [("a.png", "done")]
    first.rename(first.with_name("b.png"))
    image(first, 1)
    predicted, pruned = Store.predicted, list[int]()

    def predicted_and_pruned(store: Store, *args: Any) -> set[str]:
        known = predicted(store, *args)
        if not pruned:
            store.mark_missing(begin(store).run_id, [str(first.parent)], {str(first.with_name("b.png"))})
            pruned.append(prune(store, 0, really=True).images)
        return known

    monkeypatch.setattr(Store, "predicted", predicted_and_pruned)
    assert scanned(first.parent) == [("a.png", "done"), ("b.png", "done")] and pruned == [1]


def test_reprocess_limit_and_dry_run(sqlite_pipeline: Pipeline) -> None:
    folder = sqlite_pipeline.cwd / "in"
    for i in range(5):
        image(folder / f"{i}.png", i)
    (folder / "junk").write_bytes(b"junk")
    assert "6 file(s) would be read" in sqlite_pipeline.run("scan", folder, "--dry-run").out
    assert sqlite_pipeline.rows() == 0
    assert sqlite_pipeline.run("scan", folder, "--limit", 2).summary["processed_now"] == 2
    assert sqlite_pipeline.run("scan", folder).summary["processed_now"] == 4
    assert sqlite_pipeline.run("scan", folder, "--reprocess", "failed").summary["processed_now"] == 1
    again = sqlite_pipeline.run("scan", folder, "--reprocess", "all").summary
    assert (again["processed_now"], again["files"]) == (6, 6)
    assert sqlite_pipeline.ask("SELECT count(*) FROM predictions") == [(5,)]
    both = sqlite_pipeline.run("scan", folder, "--csv", "one", "--jsonl", "./one")
    assert both.code == 2 and "Two exports go to one file" in both.err
    for how in ([], ["--dry-run"]):
        assert sqlite_pipeline.run("scan", folder, *how, "--include", "*.dcm", "--error-on-empty").code == 4
    nothing = sqlite_pipeline.run("scan", folder, "--include", "*.dcm")
    assert nothing.code == 3 and nothing.summary["files"] == 6
    assert "No file in" in nothing.err and "fits --include *.dcm" in nothing.err and nothing.err.count("\n") == 1
    assert "fits" not in sqlite_pipeline.run("scan", folder, "--include", "*.png").err


def test_another_cascade_scores_the_same_files_and_both_answers_stay(sqlite_pipeline: Pipeline, tmp_path: Path) -> None:
    image(sqlite_pipeline.cwd / "in/a.png", 1)
    sqlite_pipeline.run("scan", "in")
    other = make_bundle(tmp_path / "other", gate_bias=-10)
    assert sqlite_pipeline.run("scan", "in", "--cascade", other).summary["labels"] == {"NOT_CHEST": 1}
    assert sqlite_pipeline.ask("SELECT count(*) FROM predictions") == [(2,)]
    assert "NOT_CHEST" in sqlite_pipeline.run("results").out


def test_csv_and_jsonl_on_stdout_are_nothing_but_rows(sqlite_pipeline: Pipeline) -> None:
    image(sqlite_pipeline.cwd / "in/a.png", 1)
    out = sqlite_pipeline.run("scan", "in", "--csv", "-").out
    assert len(list(csv.DictReader(out.splitlines()))) == 1
    assert json.loads(sqlite_pipeline.run("scan", "in", "--jsonl", "-").out)["label"] in LABELS


def test_names_from_hell_are_rows_in_every_export(sqlite_pipeline: Pipeline) -> None:
    folder = sqlite_pipeline.cwd / "in"
    folder.mkdir()
    png = image(sqlite_pipeline.cwd / "a.png", 1).read_bytes()
    names = [b"new\nline.png", b"quote'\".png", b"=cmd|' calc'!A0", b"\x1b[31mred", b"y" * 255, b"\xff\xfe.dcm"]
    names += [b"\\x41", b"-1+1.png"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(png)
    run = sqlite_pipeline.run("scan", "in", "--csv", "out.csv", "--jsonl", "out.jsonl", "--parquet", "out.parquet")
    assert run.code == 0, run.err
    assert len(read_csv(sqlite_pipeline.cwd / "out.csv")) == 8
    assert len((sqlite_pipeline.cwd / "out.jsonl").read_text().splitlines()) == 8
    table = sqlite_pipeline.run("results").out
    assert "\x1b[31mred" not in table


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["scan", "nowhere"], 1, "cannot be read"),
        (["scan", "in", "--csv", "/nowhere/out.csv"], 1, "cannot be written"),
        (["--db", "oracle://x", "scan", "in"], 2, "sqlite:///"),
        (["--db", "sqlite:////nowhere/x.db", "scan", "in"], 1, "folder"),
        (["--db", "postgresql://localhost:1/x", "scan", "in"], 1, "Postgres"),
        (["-c", "bad.toml", "scan", "in"], 2, "Unknown setting 'colour'"),
        (["-c", "none.toml", "scan", "in"], 2, "cannot be read"),
        (["scan", "in", "--cascade", "nothing"], 12, "no bundle"),
        (["scan", "in", "--device", "cuda:99"], 13, "CUDA"),
        (["scan", "in", "--device", "toaster"], 2, "device"),
        (["scan"], 2, "Missing argument"),
        (["results"], 1, "no store"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence_before_any_work(
    sqlite_pipeline: Pipeline, args: list[str], code: int, words: str
) -> None:
    image(sqlite_pipeline.cwd / "in/a.png", 1)
    (sqlite_pipeline.cwd / "bad.toml").write_text("colour = 1\n")
    run = sqlite_pipeline.run(*args)
    assert run.code == code, run.err
    assert words in run.err and "Traceback" not in run.err
    assert sqlite_pipeline.rows() == 0


def test_a_store_that_is_behind_is_refused_with_the_command_to_run(sqlite_pipeline: Pipeline) -> None:
    image(sqlite_pipeline.cwd / "in/a.png", 1)
    sqlite_pipeline.run("scan", "in")
    sqlite_pipeline.run("db", "downgrade", "base", "--yes")
    (sqlite_pipeline.cwd / "s.db").touch()
    assert sqlite_pipeline.run("db", "upgrade").code == 0
    assert sqlite_pipeline.run("scan", "in").code == 0
