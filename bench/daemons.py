"""What several whole daemons get done on one folder and one Postgres: `cxrbatch watch --once`, 1, 2 and 4 of them.

    python -m bench.daemons --files 240 [--db postgresql://…]     without --db, a server of its own

Each daemon has one decode worker, the real models, and an empty store to begin with that it shares with the others. The
rate counts from the first row to the last, so the starts are left out; CPU is that of all daemons (wait4) less that of
as many daemons which find one image. On fewer cores than daemons the rate cannot grow, but CPU an image shows what
sharing costs. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from bench.inputs import KINDS, make_kind
from bench.postgres import own_server, server_cpu_s
from cxrbatch.store import Store, migrate
from cxrbatch.store.connection import connect, parse_url

INPUTS = Path(__file__).parent / "inputs"
ROWS = """
SELECT count(*), coalesce(extract(epoch FROM max(processed_at) - min(processed_at)), 0) FROM files WHERE state = 'done'
"""


@dataclass(frozen=True, slots=True)
class Watched:
    """What some daemons did together."""

    done: int
    seconds: float  # from the first committed row to the last
    cpu_s: float
    server_cpu_s: float | None
    shares: list[int]  # files that each daemon recorded, most first


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", default="jpeg1024", choices=[kind.name for kind in KINDS])
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--daemons", default="1,2,4")
    parser.add_argument("--db", help="URL of a server; a database is made in it for each line, and dropped")
    given = parser.parse_args()
    (kind,) = (kind for kind in KINDS if kind.name == given.kind)
    folder = make_kind(kind, INPUTS, given.files)
    if folder is None:
        raise SystemExit(f"no images of the kind {given.kind}")
    with (
        contextlib.nullcontext(given.db) if given.db else own_server() as server,
        tempfile.TemporaryDirectory() as place,
    ):
        begun = watched(server, folder, 1, 1, Path(place))
        print(f"{kind.title}; a daemon's start: {begun.cpu_s:.1f} CPU s\n")
        print("| daemons | files/s | CPU ms an image: daemons | server | files of each daemon |\n|---|---|---|---|---|")
        for number in map(int, given.daemons.split(",")):
            one = watched(server, folder, given.files, number, Path(place))
            cpu_ms = (one.cpu_s - number * begun.cpu_s) / one.done * 1000
            at_server = "–" if one.server_cpu_s is None else f"{one.server_cpu_s / one.done * 1000:.1f}"
            shares = ", ".join(map(str, one.shares))
            print(f"| {number} | {one.done / one.seconds:.1f} | {cpu_ms:.1f} | {at_server} | {shares} |", flush=True)


def watched(server: str, folder: Path, files: int, daemons: int, place: Path) -> Watched:
    """Let `daemons` daemons share the first `files` images of `folder` in a new database."""
    some = Path(tempfile.mkdtemp(dir=place))
    for name in sorted(os.listdir(folder))[:files]:
        shutil.copy2(folder / name, some / name)
    with database(server) as url, Store.open(url) as store:
        before = server_cpu_s(store)
        command = [sys.executable, "-m", "cxrbatch", "--db", url, "watch", "--once", str(some)]
        env = os.environ | {"CXRBATCH_WORKERS": "1", "CXRBATCH_QUIET_S": "0"}
        with (place / "log.txt").open("a") as log:
            running = [subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=log) for _ in range(daemons)]
        cpu_s = 0.0
        for process in running:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu_s += usage.ru_utime + usage.ru_stime
        if any(process.returncode for process in running):
            raise RuntimeError((place / "log.txt").read_text())
        after = server_cpu_s(store)
        with connect(store.engine) as connection:
            done, seconds = connection.execute(sa.text(ROWS)).one()
            by_run = sa.text("SELECT count(*) FROM files GROUP BY run_id ORDER BY 1 DESC")
            shares = list(connection.execute(by_run).scalars())
    spent = None if before is None or after is None else after - before
    return Watched(done, float(seconds), cpu_s, spent, shares)


@contextlib.contextmanager
def database(server: str) -> Iterator[str]:
    """URL of a new database with the tables."""
    name = f"bench_{time.time_ns()}"
    engine = sa.create_engine(parse_url(server), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            url = parse_url(server).set(database=name).render_as_string(hide_password=False)
            migrate.upgrade(url)
            yield url
        finally:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


if __name__ == "__main__":
    main()
