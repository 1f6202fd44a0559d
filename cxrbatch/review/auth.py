"""Who is asking: passwords, sessions, the CSRF token, and the checks that every protected route goes through."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from functools import cache
from typing import Annotated, Any
from urllib.parse import urlsplit

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from fastapi import Depends, HTTPException, Request
from starlette.responses import Response

from cxrbatch.errors import Fatal, StoreDown
from cxrbatch.review.state import State, state_of
from cxrbatch.store.review_schema import Role
from cxrbatch.store.users import SESSION_HOURS, Session, open_session, session_of, user_named

__all__ = [
    "COOKIE",
    "LoggedIn",
    "LoginNeeded",
    "authenticated",
    "check_new_password",
    "client_address",
    "csrf_token",
    "hash_password",
    "password_matches",
    "require_admin",
    "require_same_origin",
    "session_if_any",
    "set_session_cookie",
    "sign",
    "signature_holds",
]

COOKIE = "cxrbatch_session"
_LEAST_CHARACTERS = 10
_MOST_CHARACTERS = 200
_SAFE = ("GET", "HEAD")


class LoginNeeded(Exception):
    """There is no session: a page goes to the login, anything else gets 401."""


def check_new_password(password: str) -> None:
    """Raises Fatal for one that is too short or too long."""
    if not _LEAST_CHARACTERS <= len(password) <= _MOST_CHARACTERS:
        raise Fatal(f"A password has {_LEAST_CHARACTERS} to {_MOST_CHARACTERS} characters.")


@cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()  # argon2id with the library's parameters (RFC 9106, low memory)


@cache
def _nobodys_hash() -> str:
    return _hasher().hash(secrets.token_urlsafe(16))


def hash_password(password: str) -> str:
    return _hasher().hash(password)


def password_matches(password_hash: str | None, password: str) -> bool:
    """Takes as long for an unknown user (None) as for a known one."""
    try:
        return _hasher().verify(password_hash or _nobodys_hash(), password[:_MOST_CHARACTERS]) and bool(password_hash)
    except (Argon2Error, InvalidHashError):
        return False


def csrf_token(session: Session) -> str:
    """Belongs to the session, and tells nothing of its token."""
    return sign(session, "csrf")


def sign(session: Session, text: str) -> str:
    """A signature that holds for this session alone, also after a restart."""
    return hmac.new(session.token.encode(), text.encode(), hashlib.sha256).hexdigest()


def signature_holds(session: Session, text: str, signature: str) -> bool:
    return hmac.compare_digest(sign(session, text).encode(), signature.encode("utf-8", "replace"))


def set_session_cookie(request: Request, response: Response, session: Session) -> None:
    response.set_cookie(
        COOKIE,
        session.token,
        max_age=SESSION_HOURS * 3600,
        httponly=True,
        samesite="strict",
        secure=_scheme(request) == "https",
        path="/",
    )


def client_address(request: Request) -> str:
    """Of the browser: behind a trusted proxy what that says, the last entry of X-Forwarded-For."""
    peer = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-for", "")
    if forwarded and _is_trusted(state_of(request), peer):
        return forwarded.rpartition(",")[2].strip()[:64]
    return peer


async def authenticated(request: Request) -> Session:
    """The session of a request. Raises LoginNeeded; 403 for a write without this session's CSRF token or Origin."""
    state = state_of(request)
    session = await _session(request, state)
    if request.method not in _SAFE:
        require_same_origin(request)
        given = request.headers.get("x-csrf-token") or await _form_field(request, "csrf")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), csrf_token(session).encode()):
            raise HTTPException(403, "This page is out of date: load it again.")
    request.state.session = session
    return session


async def session_if_any(request: Request) -> Session | None:
    """For an error page, whose request may have failed before it was authenticated."""
    try:
        return getattr(request.state, "session", None) or await _session(request, state_of(request))
    except (LoginNeeded, StoreDown):
        return None


def require_same_origin(request: Request) -> None:
    """Raises 403 for a write that another site sent. Browsers send Origin with every POST."""
    origin = request.headers.get("origin")
    if origin is None:
        same = request.headers.get("sec-fetch-site") == "same-origin"
    else:
        parts = urlsplit(origin)
        same = (parts.scheme, parts.netloc) == (_scheme(request), request.headers.get("host", ""))
    if not same:
        raise HTTPException(
            403,
            "The request comes from another site; or through a proxy that is not in review_trusted_proxies, or does "
            "not pass on Host and X-Forwarded-Proto.",
        )


async def _session(request: Request, state: State) -> Session:
    from starlette.concurrency import run_in_threadpool

    name = _proxy_user(request, state)
    token = request.cookies.get(COOKIE, "")
    if token and name != "":
        session = await run_in_threadpool(session_of, state.store, token)
        if session is not None and name in (None, session.user_name):  # else the browser has changed hands
            return session
    if name:
        user = await run_in_threadpool(user_named, state.store, name)
        if user is not None and not user.disabled:
            session = await run_in_threadpool(open_session, state.store, user.name, user.role)
            request.state.new_session = session
            return session
    raise LoginNeeded


def _proxy_user(request: Request, state: State) -> str | None:
    """The user that a trusted proxy has logged in; empty: nobody; None: the proxy has no say."""
    header = state.settings.review_user_header
    peer = request.client.host if request.client else ""
    return request.headers.get(header, "") if header and _is_trusted(state, peer) else None


def _is_trusted(state: State, peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer)
        return any(address in ipaddress.ip_network(each) for each in state.settings.review_trusted_proxies)
    except ValueError:
        return False


def _scheme(request: Request) -> str:
    peer = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-proto", "")
    return forwarded if forwarded and _is_trusted(state_of(request), peer) else request.url.scheme


async def _form_field(request: Request, name: str) -> str:
    kind = request.headers.get("content-type", "")
    if not kind.startswith("application/x-www-form-urlencoded"):
        return ""
    form: Any = await request.form(max_fields=100)
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


LoggedIn = Annotated[Session, Depends(authenticated)]  #: a parameter of every protected route


def require_admin(session: Session) -> None:
    if session.role != Role.ADMIN:
        raise HTTPException(403, "Only an administrator may do this.")
