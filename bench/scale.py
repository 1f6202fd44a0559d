"""What a store of a million files costs: the second scan, the queries of the how-to, the filters, the exports.

    make scale                                  a million files, SQLite, in /tmp/cxrbatch-scale (3 GB, a million names)
    python bench/scale.py --files 100000        fewer
    python bench/scale.py --db postgresql://…   an empty Postgres database

The tree is hard links to one empty file a folder: nothing of a known file is ever opened. The rows are written straight
into the product's own tables. Times are CPU seconds (user and system), best of two, so that a busy machine changes them
less than the wall clock; on Postgres, whose server does the work, queries show the wall clock. Nothing is asserted.
"""

# ruff: noqa: S608 - every statement is made of constants
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from cxrbatch.inference.bundle import load_bundle
from cxrbatch.ops.setup import identity_of
from cxrbatch.store import Store, migrate
from cxrbatch.store.connection import connect
from cxrbatch.types import Decision

ROOT = Path(__file__).resolve().parent.parent
HOWTO = ROOT / "docs" / "howto" / "sql.md"
QUERIES = re.findall(r"^## (.+?)\n.*?^```sql\n(.+?)^```", HOWTO.read_text(), flags=re.MULTILINE | re.DOTALL)
FIRST = ("SELECT label, count(*) FROM results GROUP BY label", "SELECT label, count(*) FROM results GROUP BY label")
FILTERS: list[dict[str, Any]] = [
    {"label": "COVID19", "order": "surest"},
    {"label": "COVID19", "min_confidence": 0.99},
    {"decision": Decision.NEEDS_REVIEW, "order": "least sure"},
    {"since": datetime(2026, 11, 1, tzinfo=UTC), "order": "newest"},
    {"min_confidence": 0.999},
    {"limit": 200},
]
IN_A_FOLDER = 1_000
MTIME_NS = 1_700_000_000_000_000_000

LABEL = (
    "CASE i%10 WHEN 0 THEN 'COVID19' WHEN 1 THEN 'PNEUMONIA' WHEN 2 THEN 'TUBERCULOSIS' WHEN 3 THEN 'NOT_CHEST'"
    " ELSE 'NORMAL' END"
)
DECISION = "CASE WHEN i%10=3 THEN 'not_chest' WHEN i%17=0 THEN 'needs_review' ELSE 'reported' END"
CONFIDENCE = "0.5+0.5*(i*7919%10007)/10007.0"
REJECTED = "i%50=7"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--where", type=Path, default=Path("/tmp/cxrbatch-scale"))
    parser.add_argument("--db", help="an empty Postgres database; without it a SQLite file in --where")
    parser.add_argument(
        "--plans", action="store_true", help="only print how SQLite goes about the queries, as Markdown"
    )
    given = parser.parse_args()
    if given.plans:
        print_plans()
        return
    tree = given.where / f"images-{given.files}"
    url = given.db or f"sqlite:///{given.where}/store-{given.files}.db"
    table = Table(title=f"{given.files:,} known files, {url.partition(':')[0]}", title_justify="left")
    for heading in ("what", "figure", "how"):
        table.add_column(heading, overflow="fold")
    make_tree(tree, given.files)
    fill(url, tree, given.files)
    scanned(table, url, tree, given.files)
    with Store.open(url) as store:
        asked(table, store, tree)
        filtered(table, store)
    for kind in ("csv", "jsonl", "parquet"):
        exported(table, url, given.where / f"out.{kind}", given.files)
    Console(width=200 if not sys.stdout.isatty() else None).print(table)


def print_plans() -> None:
    """A row a query for docs/howto/sql.md. SQLite plans without statistics: an empty store plans like a full one."""
    with tempfile.TemporaryDirectory() as folder, Store.open(f"sqlite:///{folder}/s.db") as store:
        print("| question | how SQLite finds the rows |\n|---|---|")
        for name, query in [("Of each label, through the view", FIRST[1]), *QUERIES]:
            print(f"| {name} | {plan(store, query.rstrip().rstrip(';'))} |")


def make_tree(tree: Path, number: int) -> None:
    """`number` names of empty files, a thousand a folder; kept for the next time."""
    for folder in (tree / f"{i:05}" for i in range(number // IN_A_FOLDER)):
        if folder.exists():
            continue
        part = folder.with_name("." + folder.name)
        part.mkdir(parents=True, exist_ok=True)
        first = part / "first"
        first.touch()
        os.utime(first, ns=(MTIME_NS, MTIME_NS))
        start = int(folder.name) * IN_A_FOLDER
        for i in range(start, start + IN_A_FOLDER):
            (part / f"image_{i:08}.dcm").hardlink_to(first)
        first.unlink()
        part.rename(folder)


def fill(url: str, tree: Path, number: int) -> None:
    """The rows of these files: two in a hundred rejected, one in a hundred a copy, a second cascade over a tenth."""
    migrate.upgrade(url)
    with Store.open(url) as store:
        if store.present():
            return
        for cascade in (identity_of(load_bundle(name), exact=False) for name in ("default", "covid3")):
            store.begin_run("{}", cascade, device="cpu", engine="made up", host="here", version="0")
        postgres = store.engine.dialect.name == "postgresql"
        with connect(store.engine, write=True) as connection:
            for statement in rows(postgres, tree, number):
                connection.exec_driver_sql(statement)
        if postgres:
            with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM ANALYZE")


def rows(postgres: bool, tree: Path, number: int) -> list[str]:
    """The statements that write them; both stores understand all but two expressions."""
    numbers = f"(WITH RECURSIVE g(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM g WHERE i<{number - 1}) SELECT i FROM g) n"
    sha256 = "md5(i::text)||md5((i+1)::text)" if postgres else "lower(hex(randomblob(32)))"
    at = (  # ten files a moment, a moment each twenty seconds: a million in 23 days
        "(timestamptz '2026-11-01 00:00:00+00' + i/10*20 * interval '1 second')"
        if postgres
        else "datetime(1793491200+i/10*20,'unixepoch')"
    )
    folder, name = (f"substr(CAST({10**width}+{i} AS text),2)" for width, i in ((5, f"i/{IN_A_FOLDER}"), (8, "i")))
    path = f"'{tree}/'||{folder}||'/image_'||{name}||'.dcm'"
    scored = f"NOT ({REJECTED})"
    image = "CASE WHEN i%100=10 THEN i-9 ELSE i+1 END"  # a copy of one with the same label
    return [
        f"""INSERT INTO images (id, sha256, format, rows, columns, bits_stored, number_of_frames, inverted, first_seen,
              decoder, grey_path, modality, manufacturer, photometric_interpretation, transfer_syntax_uid,
              study_instance_uid, sop_instance_uid)
            SELECT i+1, {sha256}, 'dicom', 2048, 2500, 12, 1, (1=0), {at}, 'imagecodecs 2026.3.6 jpegls',
              'rescale; window', 'DX', 'ACME', 'MONOCHROME2', '1.2.840.10008.1.2.4.70',
              '1.2.826.0.1.3680043.8.498.'||(i/2), '1.2.826.0.1.3680043.8.498.1.'||i FROM {numbers}""",
        *(
            f"""INSERT INTO predictions (id, image_id, cascade_id, run_id, gate_probability, is_chest, label,
                  confidence, decision, ood_score, processed_at)
                SELECT {first}+i+1, i+1, {cascade}, {cascade}, 0.99, (1=1), {label}, {CONFIDENCE}, {DECISION}, 0.3, {at}
                  FROM {numbers} WHERE {scored} AND i < {most}"""
            for first, cascade, label, most in (
                (0, 1, LABEL, number),
                (number, 2, f"CASE WHEN i%7=0 THEN 'COVID19' ELSE {LABEL} END", number // 10),
            )
        ),
        """INSERT INTO scores (prediction_id, label, logit, probability)
           SELECT p.id, l.label, 1.0, 0.25 FROM predictions p CROSS JOIN (SELECT 'NORMAL' AS label UNION ALL
             SELECT 'COVID19' UNION ALL SELECT 'PNEUMONIA' UNION ALL SELECT 'TUBERCULOSIS') l
            WHERE p.label <> 'NOT_CHEST' ORDER BY p.id, l.label""",
        f"""INSERT INTO files (path, size, mtime_ns, inode, state, cascade_id, run_id, image_id, prediction_id, label,
              confidence, decision, reason_code, reason, processed_at, first_seen, last_seen, is_copy, sha256,
              sop_instance_uid, study_instance_uid)
            SELECT {path}, 0, {MTIME_NS}, 0, 'done', 1, 1, p.image_id, p.id, p.label, p.confidence, p.decision,
              NULL, NULL, p.processed_at, {at}, {at}, i%100=10, g.sha256, g.sop_instance_uid, g.study_instance_uid
              FROM {numbers} JOIN predictions p ON p.image_id = {image} AND p.cascade_id = 1
                JOIN images g ON g.id = p.image_id WHERE {scored}""",
        f"""INSERT INTO files (path, size, mtime_ns, inode, state, cascade_id, run_id, reason_code, reason,
              processed_at, first_seen, last_seen)
            SELECT {path}, 0, {MTIME_NS}, 0, 'rejected', 1, 1, CASE i%100 WHEN 7 THEN 'not_an_image' ELSE 'truncated'
              END, 'No image.', {at}, {at}, {at} FROM {numbers} WHERE {REJECTED}""",
        f"""INSERT INTO reviews (image_id, reviewer, action, label, at, shown_label, shown_confidence, shown_cascade_id,
              blinded, adjudication, act_id)
            SELECT image_id, 'reader', 'override', 'NORMAL', processed_at, label, confidence, cascade_id, (1=0), (1=0),
              'made up '||id FROM predictions WHERE id%100=2 AND id<={number}""",
        """INSERT INTO reads (image_id, reader, round_id, repeat, review_id, action, label, blinded, at)
           SELECT image_id, reviewer, 0, 0, id, action, label, blinded, at FROM reviews""",
        """INSERT INTO review_status (image_id, status, label, decided_by, decided_at)
           SELECT image_id, 'agreed', label, reviewer, at FROM reviews""",
    ]


def scanned(table: Table, url: str, tree: Path, number: int) -> None:
    """The whole command, start and closing table included."""
    for what, folder in (("start of the command", tree / "none"), ("second scan, nothing changed", tree)):
        folder.mkdir(exist_ok=True)
        cpu_s, wall_s, mib = run(url, folder)
        rate = f"{number / cpu_s:,.0f} files a CPU second" if folder == tree else ""
        table.add_row(what, f"{cpu_s:.1f} CPU s, peak {mib:.0f} MiB", f"{rate} ({wall_s:.0f} s on the clock)")
        if folder != tree:
            folder.rmdir()


def run(url: str, folder: Path) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak RSS (MiB) of a scan."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "cxrbatch", "--db", url, "scan", str(folder)], stdout=subprocess.DEVNULL, cwd=ROOT
    )
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024


def asked(table: Table, store: Store, tree: Path) -> None:
    """The queries of the how-to, and the one that people type first."""
    for name, query in [FIRST, *QUERIES]:
        if query.startswith("-- SQLite only") and store.engine.dialect.name != "sqlite":
            continue
        query = query.replace("/incoming/monday/image.dcm", f"{tree}/00001/image_00001234.dcm")
        query = query.replace("/incoming/monday", f"{tree}/00001").rstrip().rstrip(";")
        with connect(store.engine) as connection:
            spent = timed(store, lambda q=query, c=connection: c.exec_driver_sql(q).all())  # type: ignore[misc]
        table.add_row(name, f"{spent * 1000:,.0f} ms", plan(store, query))


def filtered(table: Table, store: Store) -> None:
    """`cxrbatch results` with a filter: the rows that a terminal shows."""
    for given in FILTERS:
        said: list[tuple[str, Any]] = []

        def listen(_c: Any, _cursor: Any, text: str, values: Any, *_: Any, said: Any = said) -> None:
            said.append((text, values))

        sa.event.listen(store.engine, "before_cursor_execute", listen)
        spent = timed(store, lambda g=given: list(islice(store.results(**({"limit": 201} | g)), 201)))  # type: ignore[misc]
        sa.event.remove(store.engine, "before_cursor_execute", listen)
        name = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items())
        table.add_row(f"results {name}, 200 rows", f"{spent * 1000:,.0f} ms", plan(store, *said[-1]))


def timed(store: Store, act: Callable[[], Sequence[Any]]) -> float:
    clock = time.process_time if store.engine.dialect.name == "sqlite" else time.monotonic
    best = float("inf")
    for _ in range(2):
        started = clock()
        act()
        best = min(best, clock() - started)
    return best


def plan(store: Store, query: str, values: Any = ()) -> str:
    """How SQLite goes about `files`; nothing on Postgres."""
    if store.engine.dialect.name != "sqlite":
        return ""
    with connect(store.engine) as connection:
        steps = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)]
    of_interest = r"(SEARCH|SCAN) (f|files|i|new|old|audit|v)\b|USE TEMP"
    return "; ".join(f"`{step}`" for step in steps if re.match(of_interest, step))


EXPORT = """
import resource, sys
from cxrbatch.store import Store
from cxrbatch.store.export import writer_for
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
with Store.open(sys.argv[1]) as store:
    write = writer_for(sys.argv[2])
    write(sys.argv[2], store.results(limit=1000))
    before = used()
    number = write(sys.argv[2], store.results())
    after = used()
print(number, after[0] - before[0], before[1], after[1])
"""


def exported(table: Table, url: str, target: Path, number: int) -> None:
    said = subprocess.check_output([sys.executable, "-c", EXPORT, url, str(target)], text=True, cwd=ROOT).split()
    cpu_s, before, after = (float(value) for value in said[1:])
    figure = f"{cpu_s:.1f} CPU s, {int(said[0]) / cpu_s:,.0f} rows a CPU second"
    table.add_row(f"export {target.suffix}, {int(said[0]):,} rows", figure, f"RSS {before:.0f} → {after:.0f} MiB")
    target.unlink()


if __name__ == "__main__":
    main()
