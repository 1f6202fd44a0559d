"""Column types that mean the same on SQLite and Postgres."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.engine import Dialect

from cxrbatch.nouns import INT64_MAX

__all__ = ["PathText", "Utc", "big_id", "from_unsigned", "utc_text"]

#: Paths sort by their bytes, so that `path >= 'root/' AND path < 'root0'` is a range of the unique index.
PathText = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

#: Counts up by itself on both; SQLite wants exactly INTEGER for that.
big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Utc(sa.types.TypeDecorator[datetime]):
    """A moment, to the second: timestamptz on Postgres, text 'YYYY-MM-DD HH:MM:SS' (UTC) on SQLite.

    The text sorts as time does and compares with SQLite's own datetime('now').
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


@lru_cache(maxsize=64)  # a batch has one moment, in every row
def utc_text(moment: datetime) -> str:
    """'YYYY-MM-DD HH:MM:SS' in UTC, as exports and SQLite have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def from_unsigned(number: int) -> int:
    """An inode number (unsigned 64 bit) as the signed number with the same bits."""
    return number if number <= INT64_MAX else number - 2**64
