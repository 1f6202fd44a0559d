"""`cxrbatch db …`."""

from __future__ import annotations

from pathlib import Path

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.store import Store, housekeeping, migrate, only_writer

__all__ = ["backup", "check", "current", "downgrade", "prune", "upgrade"]


def upgrade(url: str, revision: str) -> None:
    try:
        with only_writer(url):  # a scan or a watch goes on with the schema that it began with
            at: str | None = migrate.upgrade(url, revision)
    except Fatal as busy:
        at = migrate.current(url) if busy.exit_code is ExitCode.STORE_IN_USE and revision == "head" else None
        if at != migrate.head():
            raise
    print(f"The store is at schema {at}.")


def downgrade(url: str, revision: str) -> None:
    with only_writer(url):
        print(f"The store is at schema {migrate.downgrade(url, revision) or 'none'}.")


def current(url: str) -> None:
    print(f"The store is at schema {migrate.current(url) or 'none'}; this program works with {migrate.head()}.")


def check(url: str) -> ExitCode:
    """Print one sentence per problem. Exit 1 for damage, 10 if only the schema is not this program's."""
    problems = housekeeping.check(url)
    for problem in problems:
        print(problem)
    if not problems:
        print("The store is sound.")
        return ExitCode.OK
    behind = migrate.current(url) != migrate.head()
    return ExitCode.STORE_NOT_AT_HEAD if behind and len(problems) == 1 else ExitCode.FATAL


def backup(url: str, file: Path) -> None:
    housekeeping.backup(url, file)
    print(f"A copy of the store is in {file}.")


def prune(url: str, days: int, *, really: bool, include_reviewed: bool) -> None:
    with Store.open(url, may_create=False) as store:
        pruned = housekeeping.prune(store, days, really=really, include_reviewed=include_reviewed)
    said = "Forgotten" if really else "Would be forgotten (add --yes to do it)"
    reviews = f", {pruned.reviews:,} review(s)" if include_reviewed else ""
    print(f"{said}: {pruned.files:,} file(s), {pruned.images:,} content(s){reviews}.")
