"""Users of the review, their sessions, and failed logins, all in the store: a restart forgets nothing."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy import select

from cxrbatch.errors import Fatal
from cxrbatch.store.connection import connect
from cxrbatch.store.review_schema import Role, login_throttle, sessions, users
from cxrbatch.store.sql import insert
from cxrbatch.store.store import Store

__all__ = [
    "SESSION_HOURS",
    "Session",
    "User",
    "add_user",
    "blocked_for_s",
    "close_session",
    "count_failure",
    "forget_failures",
    "list_users",
    "open_session",
    "session_of",
    "set_disabled",
    "set_password_hash",
    "user_named",
]

SESSION_HOURS = 12
_FREE_FAILURES = 5  # then each further failure doubles the wait
_MOST_BLOCKED_S = 900
_FORGOTTEN_AFTER = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who may log in."""

    name: str
    role: Role
    password_hash: str
    disabled: bool


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has logged in."""

    user_name: str
    role: Role
    token: str  # as in the cookie; the store has its sha256 alone

    @property
    def is_admin(self) -> bool:
        return self.role == Role.ADMIN


def add_user(store: Store, name: str, password_hash: str, role: Role) -> None:
    """Also ends sessions of names that are no user's. Raises Fatal where the name is taken."""
    with connect(store.engine, write=True) as connection:
        row = {"name": name, "password_hash": password_hash, "role": str(role), "created_at": store.now(connection)}
        written = insert(connection.dialect.name, users).values(row).on_conflict_do_nothing(index_elements=["name"])
        if connection.execute(written.returning(users.c.id)).first() is None:
            raise Fatal(
                f"There is a user {name!r} already; `cxrbatch review set-password {name}` changes the password."
            )
        # Who came in by the printed address, before there were users, is nobody that the store knows.
        known = select(users.c.name).where(users.c.name != name)
        connection.execute(sa.delete(sessions).where(sessions.c.user_name.not_in(known)))


def set_password_hash(store: Store, name: str, password_hash: str) -> None:
    """Also ends the user's sessions. Raises Fatal for an unknown name."""
    _change(store, name, {"password_hash": password_hash})


def set_disabled(store: Store, name: str, disabled: bool) -> None:
    """Let a user log in no more, or again; open sessions end. Raises Fatal for an unknown name."""
    with connect(store.engine) as connection:
        now = store.now(connection)
    _change(store, name, {"disabled_at": now if disabled else None})


def _change(store: Store, name: str, values: dict[str, object]) -> None:
    with connect(store.engine, write=True) as connection:
        changed = connection.execute(sa.update(users).where(users.c.name == name).values(values)).rowcount
        if not changed:
            raise Fatal(f"There is no user {name!r}: `cxrbatch review add-user {name}` makes one.")
        connection.execute(sa.delete(sessions).where(sessions.c.user_name == name))


def user_named(store: Store, name: str) -> User | None:
    with connect(store.engine) as connection:
        row = connection.execute(select(users).where(users.c.name == name)).first()
    return None if row is None else User(row.name, Role(row.role), row.password_hash, row.disabled_at is not None)


def list_users(store: Store) -> list[User]:
    """By name."""
    with connect(store.engine) as connection:
        rows = connection.execute(select(users).order_by(users.c.name)).all()
    return [User(row.name, Role(row.role), row.password_hash, row.disabled_at is not None) for row in rows]


def open_session(store: Store, name: str, role: Role) -> Session:
    """A new session; also clears away those that have expired."""
    token = secrets.token_urlsafe(32)
    with connect(store.engine, write=True) as connection:
        now = store.now(connection)
        connection.execute(sa.delete(sessions).where(sessions.c.expires_at <= now))
        row = {"token_sha256": _digest(token), "user_name": name, "role": str(role), "created_at": now}
        row |= {"last_seen_at": now, "expires_at": now + timedelta(hours=SESSION_HOURS)}
        connection.execute(sa.insert(sessions), row)
    return Session(name, role, token)


def session_of(store: Store, token: str) -> Session | None:
    """The session of a token, unless it has expired or was closed."""
    with connect(store.engine) as connection:
        now = store.now(connection)
        query = select(sessions).where(sessions.c.token_sha256 == _digest(token), sessions.c.expires_at > now)
        row = connection.execute(query).first()
    return None if row is None else Session(row.user_name, Role(row.role), token)


def close_session(store: Store, token: str) -> None:
    with connect(store.engine, write=True) as connection:
        connection.execute(sa.delete(sessions).where(sessions.c.token_sha256 == _digest(token)))


def blocked_for_s(store: Store, keys: Iterable[str]) -> int:
    """For how many seconds more a login by any of these keys is refused; 0: it is not."""
    with connect(store.engine) as connection:
        now = store.now(connection)
        query = select(sa.func.max(login_throttle.c.blocked_until)).where(login_throttle.c.key.in_(list(keys)))
        until = connection.execute(query).scalar_one()
    return 0 if until is None else max(0, math.ceil((until - now).total_seconds()))


def count_failure(store: Store, keys: Iterable[str]) -> None:
    """A login failed: after the fifth in a row each further one doubles the wait, up to a quarter of an hour."""
    with connect(store.engine, write=True) as connection:
        now = store.now(connection)
        connection.execute(sa.delete(login_throttle).where(login_throttle.c.last_at < now - _FORGOTTEN_AFTER))
        for key in sorted(keys):
            row = {"key": key, "failures": 1, "last_at": now}
            written = insert(connection.dialect.name, login_throttle).values(row)
            counted = {"failures": login_throttle.c.failures + 1, "last_at": now}
            written = written.on_conflict_do_update(index_elements=["key"], set_=counted)
            failures = connection.execute(written.returning(login_throttle.c.failures)).scalar_one()
            if failures >= _FREE_FAILURES:
                wait = min(_MOST_BLOCKED_S, 2 ** (failures - _FREE_FAILURES + 1))
                blocked = sa.update(login_throttle).where(login_throttle.c.key == key)
                connection.execute(blocked.values(blocked_until=now + timedelta(seconds=wait)))


def forget_failures(store: Store, key: str) -> None:
    with connect(store.engine, write=True) as connection:
        connection.execute(sa.delete(login_throttle).where(login_throttle.c.key == key))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
