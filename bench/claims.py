"""What the job queue of a Postgres gives: claims and records a second with many waiting rows, by 1, 2 and 4 claimers.

    python -m bench.claims --rows 1000000 [--db postgresql://…]     an empty database; without --db, one of its own

Each claimer is a process with a connection of its own. It claims as a daemon does and records every file as rejected,
which is the cheapest outcome, so that no more rows are claimed at a time than daemons would hold. CPU seconds are those
of the claimers and, where the server runs on this machine, of the server: other work on the machine changes them
little. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from dataclasses import dataclass

import sqlalchemy as sa

from bench.postgres import own_server, server_cpu_s
from cxrbatch.errors import ReasonCode, Rejected
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.ops.setup import identity_of
from cxrbatch.store import Backoff, JobQueue, Run, Store, migrate
from cxrbatch.store.connection import connect
from cxrbatch.store.schema import files
from cxrbatch.types import Outcome

ROOT = "/images"
NOTHING = Rejected(ReasonCode.NOT_AN_IMAGE, "Not an image.")
FILL = f"""
INSERT INTO files (path, size, mtime_ns, inode, state, first_seen, last_seen)
SELECT '{ROOT}/' || lpad((i / 1000)::text, 6, '0') || '/image_' || lpad(i::text, 9, '0') || '.dcm', 1, 1, 0, 'waiting',
       now(), now() FROM generate_series({{first}}, {{last}}) i
"""  # noqa: S608
AT_ONCE = 1_000_000  # rows in one INSERT


@dataclass(frozen=True, slots=True)
class Share:
    """What one claimer did."""

    first: float  # monotonic seconds, when its first claim began
    last: float
    claim_ms: list[float]
    record_ms: list[float]
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1000000", help="waiting rows; several are measured one after the other")
    parser.add_argument("--claimers", default="1,2,4")
    parser.add_argument("--at-a-time", default="32", help="files a claim; 32 is a daemon's with 8 workers")
    parser.add_argument("--files", type=int, default=6_400, help="that each line's claimers take together")
    parser.add_argument("--db")
    given = parser.parse_args()
    with contextlib.nullcontext(given.db) if given.db else own_server() as url:
        migrate.upgrade(url)
        with Store.open(url) as store:
            identity = identity_of(load_bundle("default"), False)
            run = store.begin_run("{}", identity, device="", engine="", host="", version="0")
            for rows in map(int, given.rows.split(",")):
                print(f"\n{rows:,} waiting rows, filled in {fill(store, rows):.0f} s; {plan(store)}\n")
                print("| claimers | files a claim | files/s | ms a claim: median | slowest | ms a record: median | "
                      "CPU ms a file: claimer | server |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
                for at_a_time in map(int, given.at_a_time.split(",")):
                    for claimers in map(int, given.claimers.split(",")):
                        print(line(store, url, run, claimers, at_a_time, given.files), flush=True)


def fill(store: Store, rows: int) -> float:
    """Add waiting rows until there are `rows`. Indexes are made afterwards, as for any large load. Seconds."""
    started = time.monotonic()
    with connect(store.engine, write=True) as connection:
        there = connection.execute(sa.text("SELECT count(*) FROM files WHERE state = 'waiting'")).scalar_one()
        last: int = connection.execute(sa.text("SELECT coalesce(max(id), 0) FROM files")).scalar_one()
        for index in files.indexes:
            index.drop(connection)
        for first in range(last + 1, last + 1 + rows - there, AT_ONCE):
            end = min(first + AT_ONCE - 1, last + rows - there)
            connection.exec_driver_sql(FILL.format(first=first, last=end))
        for index in files.indexes:
            index.create(connection)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE files")
        connection.exec_driver_sql("CHECKPOINT")
    return time.monotonic() - started


def plan(store: Store) -> str:
    """How the server finds waiting rows, and what the table and its indexes take."""
    said: list[tuple[str, object]] = []

    def listen(_c: object, _cursor: object, text: str, values: object, *_: object) -> None:
        if "FOR UPDATE" in text:
            said.append((text, values))

    job_queue = JobQueue(store, Run(0, 0), "plan", 1.0, Backoff())
    sa.event.listen(store.engine, "before_cursor_execute", listen)
    job_queue.claim([ROOT], 1)
    sa.event.remove(store.engine, "before_cursor_execute", listen)
    job_queue.release()
    text, values = said[-1]
    with connect(store.engine) as connection:
        steps = [row[0].strip() for row in connection.exec_driver_sql(f"EXPLAIN {text}", values)]  # type: ignore[arg-type]
        sizes = connection.exec_driver_sql("SELECT pg_table_size('files') / 2^30, pg_indexes_size('files') / 2^30")
        table, indexes = sizes.one()
    index = next((step.partition("  (")[0] for step in steps if "Scan" in step), steps[0])
    return f"{index.removeprefix('->').strip()}; table {table:.1f} GiB, indexes {indexes:.1f} GiB"


def line(store: Store, url: str, run: Run, claimers: int, at_a_time: int, number: int) -> str:
    each = max(1, number // claimers // at_a_time)
    before = server_cpu_s(store)
    with multiprocessing.get_context("spawn").Pool(claimers) as pool:
        jobs = [(url, run, each, at_a_time, f"{claimers}/{at_a_time}/{i}") for i in range(claimers)]
        shares = pool.starmap(work, jobs)
    after = server_cpu_s(store)
    done = claimers * each * at_a_time
    seconds = max(share.last for share in shares) - min(share.first for share in shares)
    claim_ms = [ms for share in shares for ms in share.claim_ms]
    record_ms = [ms for share in shares for ms in share.record_ms]
    server = "–" if before is None or after is None else f"{(after - before) / done * 1000:.2f}"
    return (
        f"| {claimers} | {at_a_time} | {done / seconds:,.0f} | {statistics.median(claim_ms):.1f} | {max(claim_ms):.0f} "
        f"| {statistics.median(record_ms):.1f} | {sum(share.cpu_s for share in shares) / done * 1000:.2f} | {server} |"
    )


def work(url: str, run: Run, number: int, at_a_time: int, owner: str) -> Share:
    """Claim `at_a_time` files and record them, `number` times."""
    with Store.open(url) as store:
        job_queue = JobQueue(store, run, owner, 3600.0, Backoff())
        job_queue.renew()  # opens the connection
        claim_ms: list[float] = []
        record_ms: list[float] = []
        first, cpu = time.monotonic(), time.process_time()
        for _ in range(number):
            begun = time.monotonic()
            claimed = job_queue.claim([ROOT], at_a_time)
            have = time.monotonic()
            job_queue.record([Outcome(one.file, rejected=NOTHING) for one in claimed])
            claim_ms.append((have - begun) * 1000)
            record_ms.append((time.monotonic() - have) * 1000)
        return Share(first, time.monotonic(), claim_ms, record_ms, time.process_time() - cpu)


if __name__ == "__main__":
    main()
