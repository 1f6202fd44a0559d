"""Filters of the work list in a URL, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import urlencode

from cxrbatch.store.work_list import Cursor, Filters, Reviewed, Sort
from cxrbatch.types import Decision

__all__ = ["as_query", "cursor_text", "filters_of", "parse_cursor"]

_TEXTS = ("label", "label_set", "reason", "flag", "folder", "reader")
_LONGEST = 2400  # characters: the longest stored path


def filters_of(query: Mapping[str, str]) -> Filters:
    """What a URL asks for; a value that means nothing is left out, never guessed at."""
    texts = {name: query.get(name, "").strip()[:_LONGEST] for name in _TEXTS}
    found: dict[str, Any] = {name: text for name, text in texts.items() if text and "\0" not in text}
    if query.get("decision") in set(Decision):
        found["decision"] = query["decision"]
    if query.get("reviewed") in get_args(Reviewed):
        found["reviewed"] = query["reviewed"]
    if query.get("sort") in get_args(Sort):
        found["sort"] = query["sort"]
    if query.get("disagreement") == "1":
        found["disagreement"] = True
    for name in ("min_confidence", "max_confidence"):
        number = _share(query.get(name, ""))
        if number is not None:
            found[name] = number
    since, until = _day(query.get("since", "")), _day(query.get("until", ""))
    if since is not None:
        found["since"] = since
    if until is not None:
        found["until"] = until + timedelta(days=1)  # the day itself counts
    if "folder" in found:
        inside = found["folder"].strip("/")
        # Of a bucket the store keeps the address: s3://bucket/prefix.
        found["folder"] = inside if "://" in inside else f"/{inside}" if inside else ""
    return Filters(**found)


def as_query(filters: Filters, **more: Any) -> str:
    """The filters (and more) as a query string, in a fixed order, without what is not filtered by."""
    plain = Filters()
    pairs: list[tuple[str, str]] = []
    for each in fields(filters):
        value = getattr(filters, each.name)
        if value == getattr(plain, each.name):
            continue
        if each.name == "until":
            value -= timedelta(days=1)
        pairs.append((each.name, _text(value)))
    pairs += [(name, _text(value)) for name, value in more.items() if value not in (None, "")]
    return urlencode(pairs)


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.date().isoformat()
    return "1" if value is True else str(value)


def cursor_text(cursor: Cursor | None) -> str:
    if cursor is None:
        return ""
    key = cursor.key
    return f"{key.isoformat() if isinstance(key, datetime) else repr(float(key))}~{cursor.file_id}"


def parse_cursor(text: str, filters: Filters) -> Cursor | None:
    """A place in the list of these filters; None for what is none."""
    key, _, file_id = text.partition("~")
    try:
        number = int(file_id)
        if filters.sort != "newest":
            place = float(key)
            return Cursor(place, number) if 0 <= place <= 1 and abs(number) < 2**63 else None
        moment = datetime.fromisoformat(key)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return Cursor(moment, number) if abs(number) < 2**63 else None


def _share(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= 1 else None


def _day(text: str) -> datetime | None:
    try:
        day = datetime.fromisoformat(text)
    except ValueError:
        return None
    return day.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC) if 1900 < day.year < 9000 else None
