"""What means the same on SQLite and Postgres: the metadata, column types, and statements that take many keys.

Building a SQLAlchemy statement costs more than running it on eight rows, so the modules here cache theirs with
`functools.cache`, one per dialect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Row
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Dialect

from cxrbatch.types import INT64_MAX

__all__ = [
    "AnyRow",
    "PathText",
    "Utc",
    "big_id",
    "chunks",
    "execute_for",
    "from_unsigned",
    "in_keys",
    "insert",
    "insert_new",
    "is_one_of",
    "metadata",
    "one_of",
    "text_column",
    "utc_text",
]

T = TypeVar("T")
AnyRow = Row[*tuple[Any, ...]]

#: All tables are in it, those of schema.py and those of review_schema.py.
metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: Paths sort by their bytes, so that `path >= 'root/' AND path < 'root0'` is a range of the unique index.
PathText = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

#: Autoincrements on both; SQLite needs exactly INTEGER for that.
big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Utc(sa.types.TypeDecorator[datetime]):
    """A time, to the second: timestamptz on Postgres, text 'YYYY-MM-DD HH:MM:SS' (UTC) on SQLite.

    The text sorts chronologically and compares with SQLite's own datetime('now').
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(TIMESTAMP(timezone=True))
        return dialect.type_descriptor(sa.Text())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone")
        return value.replace(microsecond=0) if dialect.name == "postgresql" else utc_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        moment: datetime = value
        return moment.astimezone(UTC)


@lru_cache(maxsize=64)  # all rows of a batch have the same time
def utc_text(moment: datetime) -> str:
    """'YYYY-MM-DD HH:MM:SS' in UTC, as exports and SQLite have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def from_unsigned(number: int) -> int:
    """An inode number (unsigned 64 bit) as the signed number with the same bits."""
    return number if number <= INT64_MAX else number - 2**64


def one_of(column: str, values: type[StrEnum]) -> sa.CheckConstraint:
    """A CHECK that a text column holds one of these."""
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def text_column(name: str) -> sa.Column[str]:
    """A text column that is empty, never NULL, where nothing is known."""
    return sa.Column(name, sa.Text, nullable=False, server_default="")


def in_keys(dialect: str, column: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """The condition that `column` is one of the keys (an array on Postgres, JSON on SQLite) given to `execute_for`."""
    if dialect == "postgresql":
        return column == sa.any_(sa.bindparam("keys", type_=ARRAY(column.type)))
    return _in_document(column, sa.bindparam("keys", type_=sa.Text()))


def is_one_of(dialect: str, column: sa.Column[Any], keys: Sequence[Any]) -> sa.ColumnElement[bool]:
    """The same with its keys, for a statement of more conditions. Postgres hashes them, also for many rows."""
    if dialect == "postgresql":
        return column.in_(sa.select(sa.func.unnest(sa.bindparam(None, keys, ARRAY(column.type))).column_valued()))
    return _in_document(column, sa.bindparam(None, json.dumps(keys, ensure_ascii=False), sa.Text()))


def _in_document(column: sa.Column[Any], document: sa.BindParameter[str]) -> sa.ColumnElement[bool]:
    return column.in_(sa.select(sa.func.json_each(document).table_valued("value").c.value))


def execute_for(
    connection: Connection, statement: sa.Executable, keys: Iterable[Any], **more: Any
) -> sa.CursorResult[Any]:
    """Execute a statement with `in_keys` for these keys; `more` are its other parameters."""
    listed = list(keys)
    bound = listed if connection.dialect.name == "postgresql" else json.dumps(listed, ensure_ascii=False)
    return connection.execute(statement, {"keys": bound, **more})


def insert(dialect: str, table: sa.Table) -> Any:
    """An INSERT with ON CONFLICT (the classes of the two dialects have no common base with it)."""
    return postgres_insert(table) if dialect == "postgresql" else sqlite_insert(table)


def insert_new(connection: Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Insert the rows whose unique keys do not exist yet; all rows have the same columns."""
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
