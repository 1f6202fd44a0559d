"""Exports: atomic, streamed, and harmless in a spreadsheet."""

from __future__ import annotations

import builtins
import csv
import io
import json
import os
import resource
import secrets
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cxrbatch.errors import ExitCode, Fatal, ReasonCode, Rejected
from cxrbatch.store import RESULT_COLUMNS, Store
from cxrbatch.store.connection import connect
from cxrbatch.store.export import check_writable, write_csv, write_jsonl, write_parquet, writer_for
from cxrbatch.store.schema import files
from cxrbatch.types import Outcome
from store_images import begin, reject, scored_file


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        run = begin(opened)
        odd = reject("/d/1", ReasonCode.NOT_AN_IMAGE)
        said = Rejected(ReasonCode.NOT_AN_IMAGE, '=HYPERLINK("http://x")')
        opened.record(
            run.run_id,
            run.cascade_id,
            [
                scored_file(
                    '/d/0 é,"\n',
                    "COVID19",
                    0.9,
                    facts={"manufacturer": "=cmd|' /C calc'!A0", "inverted": True, "grey_mean": 131.25},
                ),
                Outcome(odd.file, rejected=said),
                scored_file(
                    os.fsdecode(b"/d/2\xff"), ood_score=-0.5, facts={"modality": "-1", "body_part_examined": "@x"}
                ),
                scored_file("/d/3", "NOT_CHEST", 0.75, facts={"manufacturer": "\t=1", "view_position": "+"}),
            ],
        )
        yield opened


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_file_and_the_columns_of_the_view(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    assert write_csv(str(target), store.results()) == 4
    rows = read_csv(target)
    assert tuple(rows[0]) == RESULT_COLUMNS
    assert [row["path"] for row in rows] == ['/d/0 é,"\n', "/d/1", "/d/2\\xff", "/d/3"]
    assert [row["label"] for row in rows] == ["COVID19", "", "NORMAL", "NOT_CHEST"]
    assert (rows[0]["confidence"], rows[0]["inverted"], rows[3]["is_chest"]) == ("0.9", "true", "false")
    assert rows[0]["mtime"] == "2023-11-14 22:13:20"
    assert len(rows[0]["processed_at"]) == 19
    assert list(tmp_path.glob(".*")) == []


def test_csv_defuses_formulas_and_leaves_numbers_alone(store: Store, tmp_path: Path) -> None:
    write_csv(str(tmp_path / "out.csv"), store.results())
    rows = read_csv(tmp_path / "out.csv")
    assert rows[0]["manufacturer"] == "'=cmd|' /C calc'!A0"
    assert rows[1]["reason"].startswith("'=HYPERLINK")
    assert (rows[2]["ood_score"], rows[2]["modality"], rows[2]["body_part_examined"]) == ("-0.5", "'-1", "'@x")
    assert (rows[3]["manufacturer"], rows[3]["view_position"]) == ("'\t=1", "'+")
    for row in rows:
        for name, cell in row.items():
            assert name == "ood_score" or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_jsonl_keeps_types(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert write_jsonl(str(target), store.results()) == 4
    rows = [json.loads(line) for line in target.read_bytes().splitlines()]
    assert tuple(rows[0]) == RESULT_COLUMNS
    assert (rows[0]["confidence"], rows[0]["inverted"], rows[0]["size"]) == (0.9, True, 1000)
    assert (rows[1]["label"], rows[1]["reason"]) == (None, '=HYPERLINK("http://x")')
    assert rows[2]["path"] == "/d/2\\xff"


def test_parquet_keeps_types(store: Store, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    target = tmp_path / "out.parquet"
    assert write_parquet(str(target), store.results()) == 4
    table = parquet.read_table(target)
    assert tuple(table.column_names) == RESULT_COLUMNS
    rows = table.to_pylist()
    assert (rows[0]["confidence"], rows[0]["inverted"], rows[0]["rows"]) == (0.9, True, 2048)
    assert rows[0]["processed_at"].tzinfo is not None
    assert rows[1]["prob_covid19"] is None
    assert b"not a diagnosis" in table.schema.metadata[b"note"]


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_no_rows_make_a_file_all_the_same(tmp_path: Path, write: Callable[..., int]) -> None:
    assert write(str(tmp_path / "none"), []) == 0
    assert (tmp_path / "none").exists()


def test_standard_output_is_utf8_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    row = ["é" if name == "path" else None for name in RESULT_COLUMNS]
    write_csv("-", [row])
    write_jsonl("-", [row])
    assert raw.getvalue().decode().count("é") == 2
    with pytest.raises(Fatal, match="standard output"):
        write_parquet("-", [])


def test_a_failing_export_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"

    def rows() -> Iterator[Any]:
        yield [None] * len(RESULT_COLUMNS)
        raise RuntimeError("the store went away")

    for write in (write_csv, write_jsonl, write_parquet):
        target.unlink(missing_ok=True)
        write(str(target), [["before", *[None] * (len(RESULT_COLUMNS) - 1)]])
        before = target.read_bytes()
        with pytest.raises(RuntimeError, match="went away"):
            write(str(target), rows())
        assert target.read_bytes() == before
        assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("ending", ["\r", "\n", "\r\n"])
def test_a_line_break_in_a_file_name_neither_splits_the_row_nor_hides_a_formula(
    store_url: str, tmp_path: Path, ending: str
) -> None:
    name = f"/d/a{ending}=cmd|' /C calc'!A0.png"
    plain = f"/d/b{ending}b.png"
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(name), scored_file(plain)])
        write_csv(str(tmp_path / "out.csv"), store.results())
        write_jsonl(str(tmp_path / "out.jsonl"), store.results())
    rows = read_csv(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [name.replace("=", "'="), plain]
    assert [row["label"] for row in rows] == ["NORMAL", "NORMAL"]
    for line in (tmp_path / "out.csv").read_bytes().replace(b"\r", b"\n").split(b"\n"):
        assert not line.startswith((b"=", b"+", b"-", b"@", b"\t")), line
    assert json.loads((tmp_path / "out.jsonl").read_bytes().split(b"\n")[0])["path"] == name


WRITERS: dict[str, Callable[..., int]] = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_only_regular_files_are_written_and_nothing_hangs(tmp_path: Path, kind: str) -> None:
    write, target = WRITERS[kind], tmp_path / f"out.{kind}"
    (tmp_path / f"real.{kind}").touch()
    makers: dict[str, Callable[[], object]] = {
        "a symlink": lambda: target.symlink_to(f"real.{kind}"),
        "a FIFO": lambda: os.mkfifo(target),
        "a folder": lambda: target.mkdir(),
        "a socket": lambda: socket.socket(socket.AF_UNIX).bind(os.path.relpath(target)),
    }
    if os.geteuid() == 0:
        makers["a device"] = lambda: os.mknod(target, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    for what, make in makers.items():
        make()
        before = os.lstat(target)
        for attempt in (lambda: check_writable(str(target), write), lambda: write(str(target), [])):
            with pytest.raises(Fatal, match=f"cannot be written: it is {what}"):
                attempt()
        assert os.lstat(target).st_ino == before.st_ino and (tmp_path / f"real.{kind}").read_bytes() == b""
        target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink()
    os.mkfifo(tmp_path / f".out.{kind}.part")  # the name beside it is not opened blindly either
    with pytest.raises(Fatal, match="cannot be written"):
        write(str(target), [])


@pytest.mark.parametrize("kind", WRITERS)
def test_only_an_earlier_export_or_an_empty_file_is_replaced(tmp_path: Path, kind: str) -> None:
    write, target = WRITERS[kind], tmp_path / f"out.{kind}"
    for content in (b"\x89PNG\r\n\x1a\n", b"\0" * 128 + b"DICM", b"id,label\n1,x\n", b"[1]", b"PAR1 of others PAR1"):
        target.write_bytes(content)
        for attempt in (lambda: check_writable(str(target), write), lambda: write(str(target), [])):
            with pytest.raises(Fatal, match="is there already"):
                attempt()
        assert target.read_bytes() == content
        assert os.listdir(tmp_path) == [target.name]
    target.write_bytes(b"")
    rows = [[os.fspath(target), *[None] * (len(RESULT_COLUMNS) - 1)]]
    for _ in range(2):
        check_writable(str(target), write)
        assert write(str(target), rows) == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path: Path, kind: str) -> None:
    write, target = WRITERS[kind], tmp_path / f"out.{kind}"
    write(str(target), [])
    before = target.read_bytes()
    rows = [[secrets.token_hex(2000), *[None] * (len(RESULT_COLUMNS) - 1)] for _ in range(100)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead, which reads like ENOSPC
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(Fatal, match="cannot be written"):
            write(str(target), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert target.read_bytes() == before and os.listdir(tmp_path) == [target.name]


def test_unwritable_targets_are_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "no" / "out.csv", tmp_path / "file" / "out.csv", Path("/proc/out.csv")):
        with pytest.raises(Fatal, match="cannot be written"):
            check_writable(str(target), write_csv)
    monkeypatch.chdir(tmp_path)
    for fine in ("-", str(tmp_path / "out.csv"), "out.csv", str(tmp_path / ("n" * 251 + ".csv"))):
        check_writable(fine)
    assert os.listdir(tmp_path) == ["file"]


def test_two_exports_to_one_name_do_not_mix(tmp_path: Path) -> None:
    target = str(tmp_path / "out.csv")

    def rows() -> Iterator[Any]:
        with pytest.raises(Fatal, match="another program"):
            write_csv(target, [])
        yield [None] * len(RESULT_COLUMNS)

    assert write_csv(target, rows()) == 1
    assert len(read_csv(Path(target))) == 1


def test_what_a_killed_export_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".out.csv.part").write_text("half a row" * 1000)
    write_csv(str(tmp_path / "out.csv"), [])
    assert os.listdir(tmp_path) == ["out.csv"]
    assert (tmp_path / "out.csv").read_text().count("\n") == 1


def test_the_suffix_tells_the_format() -> None:
    assert writer_for("a/b.CSV") is write_csv
    assert writer_for("b.jsonl") is write_jsonl
    assert writer_for("b.parquet") is write_parquet
    with pytest.raises(Fatal, match=r"\.csv, \.jsonl or \.parquet") as caught:
        writer_for("b.xlsx")
    assert caught.value.exit_code is ExitCode.USAGE


def test_parquet_without_its_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Fatal, match=r"pip install 'cxrbatch\[parquet\]'"):
        check_writable(str(tmp_path / "out.parquet"))


STREAM = """
import resource, sys
from cxrbatch.store import Store
from cxrbatch.store.export import write_csv, write_jsonl, write_parquet

with Store.open(sys.argv[1]) as store:
    write = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}[sys.argv[2]]
    write(sys.argv[3], store.results(limit=1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number = write(sys.argv[3], store.results())
    print(number, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_stays_flat_over_a_large_export(store_url: str, tmp_path: Path, kind: str) -> None:
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file(f"/d/{i:04}") for i in range(1000)])
        names = ", ".join(column.name for column in files.c if column.name not in ("id", "path"))
        with connect(store.engine, write=True) as connection:
            for copy in range(5):
                connection.exec_driver_sql(
                    f"INSERT INTO files (path, {names}) SELECT path || '/{copy}', {names} FROM files"
                )
    output = tmp_path / f"out.{kind}"
    command = [sys.executable, "-c", STREAM, store_url, kind, str(output)]
    number, grown_mib = subprocess.check_output(command, text=True).split()
    assert int(number) == 32_000
    # All rows at once take over 40 MiB; Parquet holds a group of 5,000 of them.
    assert int(grown_mib) < (20 if kind == "csv" else 45)
