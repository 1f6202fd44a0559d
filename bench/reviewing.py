"""How long the server takes for a page of the work list at a million files: `python -m bench.reviewing`.

The rows are those of bench/scale.py, without files: one image in a hundred is reviewed. Each figure is the best of
three, on the clock, in this process, from the query to the rows of the page, or to the count above them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.scale import fill
from cxrbatch.review.filters import as_query
from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.store.work_list import Cursor, Filters, count, page, rows_of

_ROWS = 50
LISTS = (
    Filters(),
    Filters(decision="needs_review"),
    Filters(decision="needs_review", reviewed="no"),
    Filters(reviewed="no"),
    Filters(reviewed="not_mine"),
    Filters(reader="reader"),
    Filters(disagreement=True),
    Filters(label="COVID19", sort="certain"),
    Filters(sort="newest"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--where", type=Path, default=Path("/tmp/cxrbatch-scale"))
    parser.add_argument("--db", help="an empty Postgres database; without it a SQLite file in --where")
    given = parser.parse_args()
    given.where.mkdir(parents=True, exist_ok=True)
    url = given.db or f"sqlite:///{given.where}/review-{given.files}.db"
    fill(url, given.where / "images", given.files)
    table = Table(title=f"Work list, {given.files:,} files, {url.partition(':')[0]}", title_justify="left")
    for heading in ("list", "first page", "page in the middle", "count"):
        table.add_column(heading)
    with Store.open(url) as store:
        for filters in LISTS:
            table.add_row(as_query(filters) or "all", *timings(store, filters))
    Console().print(table)


def timings(store: Store, filters: Filters) -> list[str]:
    middle = None if filters.sort == "newest" else Cursor(0.7, 0)
    return [
        best(store, filters, None),
        best(store, filters, middle) if middle else "",
        best(store, filters, None, counting=True),
    ]


def best(store: Store, filters: Filters, after: Cursor | None, *, counting: bool = False) -> str:
    spent = []
    for _ in range(3):
        started = time.monotonic()
        with connect(store.engine) as connection:
            if counting:
                count(connection, filters, "dr_a")
            else:
                rows_of(connection, page(connection, filters, "dr_a", _ROWS, after=after).file_ids)
        spent.append(time.monotonic() - started)
    return f"{1000 * min(spent):,.0f} ms"


if __name__ == "__main__":
    main()
