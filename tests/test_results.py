"""`cxrbatch results`, `show`, `export`: the order of the rows, and how a path may be written."""

from __future__ import annotations

import io
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxrbatch.cli import app, main
from cxrbatch.store import Store
from cxrbatch.types import Decision
from store_images import begin, scored_file


def test_a_table_begins_with_what_its_filter_is_about(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    times = iter(datetime(2026, 11, day, tzinfo=UTC) for day in range(1, 10))
    with Store.open(url, clock=lambda: next(times)) as store:
        run = begin(store)
        for path, confidence in (("/x/b", 0.6), ("/x/c", 0.9), ("/x/a", 0.8)):
            unsure = scored_file(path, "NORMAL", confidence, decision=Decision.NEEDS_REVIEW)
            store.record(run.run_id, run.cascade_id, [unsure])

    def order(*filters: str) -> str:
        shown = CliRunner().invoke(app, ["--db", url, "results", *filters])
        assert shown.exit_code == 0, shown.output
        return "".join(re.findall(r"/x/(\w)", shown.output))

    assert order() == "abc"
    assert order("--needs-review") == "bac"
    assert order("--label", "NORMAL") == "cab"
    assert order("--since", "2026-11-01") == "acb"
    assert order("--since", "2026-11-01", "--label", "NORMAL", "--limit", "2") == "ac"
    assert order("--since", "2026-11-01", "--under", "/x") == order("--since", "2026-11-01", "--format", "csv") == "abc"


def test_a_trace_is_json_on_every_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal's encoding does not have is printed as \\xe9, which is no JSON."""
    url, image = f"sqlite:///{tmp_path / 's.db'}", "/x/é.dcm"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(image)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["cxrbatch", "--db", url, "show", "--json", image])
    with pytest.raises(SystemExit):
        main()
    sys.stdout.seek(0)
    assert json.load(sys.stdout)["files"][0]["file"]["path"] == image


def test_no_row_is_a_sentence_and_not_a_bare_heading(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/x/a", "COVID19")])
    done = CliRunner().invoke(app, ["--db", url, "results", "--label", "covid"])
    assert (done.exit_code, done.stdout) == (0, "No row matches.\n")


def test_brackets_in_a_name_are_shown(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/x/[old]/a:x:[/b].dcm", "COVID19")])
    assert "/x/[old]/a:x:[/b].dcm " in CliRunner().invoke(app, ["--db", url, "results"]).stdout
    exported = CliRunner().invoke(app, ["--db", url, "export", f"{tmp_path}/a[b].csv"])
    assert f"1 row(s) in {tmp_path}/a[b].csv\n" in exported.stderr


def test_a_file_that_is_gone_is_shown_as_missing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/x/a", "COVID19"), scored_file("/x/b", "COVID19")])
        store.mark_missing(run.run_id, ["/x"], {"/x/b"})
    shown = CliRunner().invoke(app, ["--db", url, "results"]).stdout.splitlines()
    assert ["missing" in line for line in shown if "/x/" in line] == [True, False]


@pytest.mark.parametrize("folder", ["../in", "{root}/x/../in/", "/{root}/in"])
def test_a_folder_and_a_file_may_be_named_as_scan_takes_them(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"{tmp_path}/in/a"), scored_file(f"{tmp_path}/b")])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = folder.format(root=tmp_path)
    rows = CliRunner().invoke(app, ["--db", url, "results", "--under", folder, "--format", "jsonl"]).stdout
    assert [json.loads(line)["path"] for line in rows.splitlines()] == [f"{tmp_path}/in/a"]
    for how in ([], ["--json"]):
        assert f"{tmp_path}/in/a" in CliRunner().invoke(app, ["--db", url, "show", *how, f"{folder}/a"]).stdout
    assert CliRunner().invoke(app, ["--db", url, "export", "out.csv", "--under", folder]).exit_code == 0
    assert [line.split(",")[0] for line in Path("out.csv").read_text().splitlines()[1:]] == [f"{tmp_path}/in/a"]
