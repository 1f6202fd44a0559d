"""The benchmark's arithmetic: medians, paired ratios, rows left after a kill, changes between exact and cheap."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent))  # last: cxrbatch itself is the installed one

from bench import claims
from bench.figures import Figure, figures_of, labels_agree
from bench.flips import Found, Looked, as_file, enter, read_both
from bench.inputs import _NUMBERED, KINDS, image_paths, make_kind
from bench.measure import committed, run_tree
from bench.plot import draw
from bench.report import machine, write_docs
from bench.scale import fill
from cxrbatch.imaging.decode import read_grey
from cxrbatch.samples.dicom import as_dicom, write_dicom
from cxrbatch.samples.phantom import Chest, draw_chest
from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.store.housekeeping import check
from cxrbatch.store.schema import files
from cxrbatch.types import Decision, ModelInputSpec
from store_images import begin, image, prediction, reject, scored_file
from test_store_queries import ask


def a_scan(wall_s: float, cpu_s: float, going: tuple[float, int] | None = (2.0, 20)) -> dict[str, Any]:
    labels = {f"{i}.jpg": "NORMAL" for i in range(80)}
    return {"files": 80, "wall_s": wall_s, "cpu_s": cpu_s, "going": going, "rss_mib": wall_s, "labels": labels}


def a_loop(loop_s: float) -> dict[str, Any]:
    labels = {"0.jpg": "NORMAL", "1.jpg": "COVID19", "2.jpg": "NORMAL", "3.jpg": "NORMAL"}
    return {"files": 4, "loop_s": loop_s, "loop_cpu_s": 2 * loop_s, "rss_mib": 100.0, "labels": labels}


def a_round(scan: dict[str, Any], loop_s: float) -> dict[str, Any]:
    floor = {"files": 80, "wall_s": {"decode": 1.0, "networks": 1.0}, "cpu_s": {"decode": 2.0, "networks": 2.0}}
    failed = {"files": 4, "failed": "no decoder"}
    return {"scan": scan, "floor": floor, "batch1": a_loop(loop_s), "loader": failed, "process": a_loop(2.0)}


#: Scans of 20, 30 and 60 files/s, side by side with loops of 2, 1 and 5.
ROUNDS = [
    a_round(a_scan(5.0, 9.0), 2.0),
    a_round(a_scan(4.0, 4.95), 4.0),
    a_round(a_scan(3.0, 12.85), 0.8),
]
START = [{"cpu_s": 1.0, "first_row_s": seconds} for seconds in (2.0, 9.0, 3.0)]
FOUND: dict[str, Any] = {
    "machine": machine(),
    "rounds": 3,
    "load": [0.1, 0.2],
    "start": START,
    "kinds": {"jpeg2000": ROUNDS},
    "kept": {"scan": "64 of 100", "batch1": "0 of 20"},
}


def test_ratios_are_paired_round_by_round_and_starts_are_left_out() -> None:
    figures = {figure.subject: figure for figure in figures_of(ROUNDS, START)}
    assert figures["scan"] == Figure("scan", 30.0, None, pytest.approx(8e3 / 79), None, 4.0, None)
    loop = figures["batch1"]
    assert loop.rate == 2.0
    assert loop.ratio == 12.0  # the median of 10, 30 and 12; that of the medians were 15
    assert loop.cpu_ms == 1000.0
    assert loop.cpu_ratio == pytest.approx(79 / 8)
    assert loop.agree == 0.75
    assert figures["process"].ratio == 15.0
    assert "loader" not in figures, "it could not read these images"
    assert (figures["floor"].rate, figures["floor"].ratio, figures["floor"].cpu_ms) == (40.0, 0.75, 50.0)


def test_where_the_first_rows_came_late_the_whole_run_counts() -> None:
    for going in (None, (4.5, 70)):
        (figure, *_) = figures_of([a_round(a_scan(5.0, 9.0, going), 2.0)], START[:1])
        assert figure.rate == 16.0
    assert labels_agree({}, {}) == 0.0


def test_the_document_gets_the_tables_between_its_markers_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "performance.md"
    page.write_text("# Speed\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nthe rest\n")
    write_docs(page, FOUND)
    text = page.read_text()
    assert text.startswith("# Speed\n<!-- bench:begin -->\n") and text.endswith("\n<!-- bench:end -->\nthe rest\n")
    assert "old" not in text
    assert "| JPEG 2000 px | 30.0 | 2.0 | cannot | 2.0 | 40.0 | 12.0 | – | 15.0 | 75% |" in text
    assert " 75% | – | 75% | 4 | 100 | – | 100 |\n" in text, "labels as ours, peaks"
    assert "| scan of one image: first row after | 3.00 s |" in text
    assert "| rows left by kill -9 at half-way | cxrbatch scan 64 of 100, loop, batch 1 0 of 20 |" in text
    draw(FOUND, tmp_path / "images" / "bench.png")
    assert (tmp_path / "images" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_tree_is_measured_to_its_end(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print('starting');"
        "subprocess.run([sys.executable, '-c', 'sum(range(3_000_000))']); print('{\"seconds\": 0.5}')"
    )
    cost = run_tree([sys.executable, "-c", code], tmp_path)
    assert (cost.code, cost.out) == (0, {"seconds": 0.5})
    assert cost.cpu_s > 0 and cost.wall_s > 0 and cost.rss_mib > 1
    assert run_tree([sys.executable, "-c", "import sys; sys.exit('cannot')"], tmp_path).code == 1
    assert (tmp_path / "stderr.txt").read_text().strip() == "cannot"


def test_a_kill_comes_once_enough_rows_are_committed_and_they_are_counted(tmp_path: Path) -> None:
    store = tmp_path / "scan.db"
    assert committed(store) == 0, "no store yet"
    with Store.open(f"sqlite:///{store}") as opened:
        run = begin(opened)
        opened.record(run.run_id, run.cascade_id, [scored_file("/a"), reject("/b"), *map(scored_file, ("/c", "/d"))])
    assert committed(store) == 4
    code = f"""
import sqlite3, time
connection = sqlite3.connect({str(store)!r}, isolation_level=None)
for path, state in (("/b", "rejected"), ("/c", "done")):
    time.sleep(0.1)
    connection.execute("UPDATE files SET state = ? WHERE path = ?", (state, path))
time.sleep(60)
"""
    with connect(opened.engine, write=True) as connection:
        connection.exec_driver_sql("UPDATE files SET state = 'waiting' WHERE path <> '/a'")
    rows = partial(committed, store)
    cost = run_tree([sys.executable, "-c", code], tmp_path, rows=rows, under_way=2, kill_when=lambda: rows() >= 3)
    assert cost.code == -9
    assert rows() == 3
    assert cost.first_row_s is not None and cost.going is not None
    assert cost.first_row_s <= cost.going[0] <= cost.wall_s and cost.going[1] in (2, 3)


def test_no_two_images_have_the_same_bytes_and_all_have_their_images(tmp_path: Path) -> None:
    folder = make_kind(KINDS[0], tmp_path, 4)
    assert folder is not None and make_kind(KINDS[0], tmp_path, 2) == folder, "what is there is kept"
    files = [Path(path).read_bytes() for path in image_paths(folder, 10)]
    assert len(set(files)) == 4
    first, _, _, again = (read_grey(file)[0] for file in files)  # three images in turn
    np.testing.assert_array_equal(first, again)
    grey = np.rint(draw_chest(Chest(rows=160, columns=144)) * 255).astype(np.uint8)
    for suffix, data in ((".png", as_file(grey, "PNG")), (".dcm", write_dicom(as_dicom(grey)))):
        numbered = [_NUMBERED[suffix](data, number) for number in (0, 1)]
        assert len({data, *numbered}) == 3
        for one in numbered:
            np.testing.assert_array_equal(read_grey(one)[0], grey)


def test_flips_are_counted_where_a_prediction_changes() -> None:
    exact = [prediction("NORMAL", 0.6), prediction("NORMAL", 0.9)]
    cheap = [prediction("COVID19", 0.6), prediction("NORMAL", 0.8, decision=Decision.NEEDS_REVIEW)]
    answers = iter([exact, cheap])
    bundle = SimpleNamespace(gate=SimpleNamespace(threshold=0.5), disease=SimpleNamespace(threshold=0.7))
    cascade: Any = SimpleNamespace(score=lambda images: next(answers), bundle=bundle)
    both = image("exact"), image("cheap")
    found = Found()
    looked = [Looked("JPEG", "a", 3, both), Looked("JPEG", "b", 1, both), Looked("JPEG", "c")]
    enter([*looked, Looked("JPEG", "d", refused=("an image", "truncated"))], cascade, found)
    row = found.rows["JPEG"]
    assert row.count == {"files": 4, "shrunk": 2, "label": 2, "decision": 1}
    assert row.grey == 3
    assert sorted(row.deltas) == pytest.approx([0.0, 0.1, 0.6 - 0.4 / 3])
    assert len(found.flips) == 3
    assert "label NORMAL -> COVID19; exact: gate 0.999 (threshold 0.500), NORMAL 0.600" in "\n".join(found.flips)


def test_what_reads_the_same_both_ways_is_not_scored(tmp_path: Path) -> None:
    def make(path: Path) -> list[tuple[str, bytes]]:
        return [("as it is", path.read_bytes()), ("cut", path.read_bytes()[:2000])]

    path = Path(next(image_paths(make_kind(KINDS[0], tmp_path, 1) or tmp_path, 1)))
    shrunk, cut = read_both(make, (ModelInputSpec(64),), path)
    assert shrunk.grey > 0 and shrunk.both is not None
    assert cut.refused is not None and cut.refused[0] == cut.refused[1]
    (same, _) = read_both(make, (ModelInputSpec(700),), path)
    assert (same.grey, same.both, same.refused) == (0, None, None)


def test_the_store_of_a_million_is_a_store_that_the_product_could_have_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    fill(url, tmp_path / "scored_files", 1000)
    assert check(url) == []
    with Store.open(url) as store:
        assert store.present() == 1000
        assert store.counts().by_state == {"done": 980, "rejected": 20}
        assert len(ask(store, "Which files hold the same image?")) == 10
    fill(url, tmp_path / "scored_files", 1000)  # is there already
    with Store.open(url) as store:
        assert store.present() == 1000


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_claimers_take_what_was_filled_in_and_find_it_by_the_index(store_url: str) -> None:
    with Store.open(store_url) as store:

        def states() -> dict[str, int]:
            with connect(store.engine) as connection:
                rows = connection.exec_driver_sql("SELECT state, count(*) AS number FROM files GROUP BY 1").all()
            return {row.state: row.number for row in rows}

        run = begin(store)
        for rows in (3_000, 5_000):  # filled up
            claims.fill(store, rows)
            assert states() == {"waiting": rows}
        assert claims.plan(store).startswith("Index Scan using ix_files_state_label_decision on files; table ")
        share = claims.work(store_url, run, 3, 8, "one")
        assert len(share.claim_ms) == len(share.record_ms) == 3
        assert states() == {"rejected": 24, "waiting": 4_976}
        with connect(store.engine) as connection:
            indexes = connection.exec_driver_sql("SELECT indexname FROM pg_indexes WHERE tablename = 'files'").all()
        assert {index.name for index in files.indexes} < {name for (name,) in indexes}, "made again"
