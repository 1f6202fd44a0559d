"""`cxrbatch db …` and the doctor's look at the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.ops.settings_table import without_password
from cxrbatch.store import Store, StoreDown, housekeeping, migrate
from cxrbatch.store.engine import parse_url, sqlite_file

__all__ = ["backup", "check", "current", "downgrade", "look", "prune", "upgrade"]


def upgrade(url: str, revision: str) -> None:
    print(f"The store is at schema {migrate.upgrade(url, revision)}.")


def downgrade(url: str, revision: str) -> None:
    print(f"The store is at schema {migrate.downgrade(url, revision) or 'none'}.")


def current(url: str) -> None:
    print(f"The store is at schema {migrate.current(url) or 'none'}; this program works with {migrate.head()}.")


def check(url: str) -> ExitCode:
    """Print what is wrong, one sentence each. Exit 1 when something is, 10 when only the schema is behind."""
    problems = housekeeping.check(url)
    for problem in problems:
        print(problem)
    if not problems:
        print("The store is sound.")
    return ExitCode.FATAL if problems else ExitCode.OK


def backup(url: str, file: Path) -> None:
    housekeeping.backup(url, file)
    print(f"A copy of the store is in {file}.")


def prune(url: str, days: int, *, really: bool) -> None:
    with Store.open(url, may_create=False) as store:
        pruned = housekeeping.prune(store, days, really=really)
    said = "Forgotten" if really else "Would be forgotten (add --yes to do it)"
    print(f"{said}: {pruned.files:,} file(s), {pruned.images:,} content(s).")


def look(url: str) -> Iterator[tuple[Literal["ok", "note", "bad"], str]]:
    """The doctor's lines about the store."""
    name = without_password(url)
    parsed = parse_url(url)
    if parsed.drivername.startswith("sqlite") and not sqlite_file(parsed).exists():
        yield "ok", f"{name} is not there yet; the first scan makes it"
        return
    try:
        with Store.open(url, may_create=False) as store:
            files = sum(store.counts().by_state.values())
            yield "ok", f"{name} at schema {migrate.head()}, {files:,} file(s)"
            for warning in store.warnings:
                yield "note", warning
    except (Fatal, StoreDown) as error:
        yield "bad", str(error)
