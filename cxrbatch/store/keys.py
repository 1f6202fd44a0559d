"""Statements that take many keys as one bound value, and are therefore built and prepared once.

Building a SQLAlchemy statement costs more than running it on eight rows: the modules here keep theirs by
`functools.cache`, one a dialect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Row
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

__all__ = ["AnyRow", "among", "bound", "chunks", "insert", "insert_new"]

T = TypeVar("T")
AnyRow = Row[*tuple[Any, ...]]


def among(dialect: str, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """`column` is one of the keys that are bound to :keys, see `bound`."""
    if dialect == "postgresql":
        return column == sa.any_(sa.bindparam("keys", type_=ARRAY(column.type)))
    document = sa.bindparam("keys", type_=sa.Text())
    return column.in_(sa.select(sa.func.json_each(document).table_valued("value").c.value))


def bound(connection: Connection, keys: Iterable[Any]) -> Any:
    """The value of :keys for a statement with `among`: an array on Postgres, JSON on SQLite."""
    listed = list(keys)
    return listed if connection.dialect.name == "postgresql" else json.dumps(listed, ensure_ascii=False)


def insert(dialect: str, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT (the two dialects' classes share no base that does)."""
    return postgres_insert(table) if dialect == "postgresql" else sqlite_insert(table)


def insert_new(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Insert what is not there yet, by any unique key; all rows name the same columns."""
    if rows:
        name = connection.dialect.name
        statement = _NEW.get((name, table.name))
        if statement is None:
            statement = _NEW[name, table.name] = insert(name, table).on_conflict_do_nothing()
        connection.execute(statement, rows)


_NEW: dict[tuple[str, str], Any] = {}


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of at most `size`."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
