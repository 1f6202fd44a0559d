"""Logging in and out."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from cxrbatch.review import auth
from cxrbatch.review.auth import LoggedIn
from cxrbatch.review.state import State, state_of
from cxrbatch.store.review_images import write_audit
from cxrbatch.store.review_schema import Role
from cxrbatch.store.users import (
    Session,
    blocked_for_s,
    close_session,
    count_failure,
    forget_failures,
    list_users,
    open_session,
    user_named,
)

__all__ = ["router"]

router = APIRouter()


@router.get("/login")
def login_page(request: Request) -> Response:
    return _page(request, "")


@router.post("/login")
async def log_in(request: Request) -> Response:
    auth.require_same_origin(request)
    state = state_of(request)
    form = await request.form(max_fields=10)
    name, password = (str(form.get(field, ""))[:200].replace("\0", "") for field in ("name", "password"))
    keys = (f"user {name}", f"address {auth.client_address(request)}")
    waiting = await run_in_threadpool(blocked_for_s, state.store, keys)
    if waiting:
        return _page(request, f"Too many failed logins: try again in {waiting} s.", 429, name)
    session = await run_in_threadpool(_check, state, name, password, keys)
    if session is None:
        return _page(request, "Name or password is wrong.", 403, name)
    response = RedirectResponse("/images", 303)
    auth.set_session_cookie(request, response, session)
    return response


def _check(state: State, name: str, password: str, keys: tuple[str, ...]) -> Session | None:
    user = user_named(state.store, name)
    if not auth.password_matches(user.password_hash if user else None, password) or user is None or user.disabled:
        count_failure(state.store, keys)
        write_audit(state.store, name, "login_failed")
        return None
    for key in keys:  # the address too: all readers of a hospital may share it, and somebody mistypes every day
        forget_failures(state.store, key)
    write_audit(state.store, name, "login")
    return open_session(state.store, user.name, user.role)


@router.get("/enter")
async def enter(request: Request, key: str = "") -> Response:
    """The address that is printed at the start, for this machine, while the store has no users."""
    state = state_of(request)
    right = bool(state.local_key) and hmac.compare_digest(key.encode(), state.local_key.encode())
    has_users = any(not user.disabled for user in await run_in_threadpool(list_users, state.store))
    if not right or has_users:
        return _page(request, "This address is not valid (any more): log in, or start the review again.", 403)
    await run_in_threadpool(write_audit, state.store, state.local_user, "login")
    session = await run_in_threadpool(open_session, state.store, state.local_user, Role.ADMIN)
    response = RedirectResponse("/images", 303)
    auth.set_session_cookie(request, response, session)
    return response


@router.post("/logout")
def log_out(request: Request, session: LoggedIn) -> Response:
    state = state_of(request)
    close_session(state.store, session.token)
    write_audit(state.store, session.user_name, "logout")
    response = RedirectResponse("/login", 303)
    response.delete_cookie(auth.COOKIE, path="/")
    return response


def _page(request: Request, problem: str, status: int = 200, name: str = "") -> Response:
    values = {"problem": problem, "name": name}
    return state_of(request).templates.TemplateResponse(request, "login.html", values, status)
