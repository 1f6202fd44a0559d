"""Rounds of reading: making one, reading in it, closing it, and deciding what its readers disagree about."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request
from fastapi.responses import RedirectResponse
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from cxrbatch.review.auth import LoggedIn, csrf_token, require_admin
from cxrbatch.review.filters import as_query, filters_of
from cxrbatch.review.image_state import blinded_state, open_state
from cxrbatch.review.images import signed
from cxrbatch.review.state import State, state_of
from cxrbatch.review.work_list import FLAGS, REASONS, known_labels
from cxrbatch.store.connection import connect
from cxrbatch.store.review_images import in_round, is_hidden, newest_cascade, review_image, write_audit
from cxrbatch.store.rounds import (
    NewRound,
    assignment,
    close_round,
    create_round,
    disputed_images,
    first_unread,
    list_rounds,
    progress_of,
    round_of,
)
from cxrbatch.store.sql import AnyRow
from cxrbatch.store.users import Session, list_users
from cxrbatch.types import Decision

__all__ = ["router"]

router = APIRouter()
RoundId = Annotated[int, Path(ge=1, lt=2**63)]
Position = Annotated[int, Path(ge=1, lt=2**31)]


@router.get("/rounds")
def rounds_page(request: Request, session: LoggedIn) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        found = [(each, progress_of(connection, each.id)) for each in list_rounds(connection)]
        labels = known_labels(connection)
    values = {
        "session": session,
        "csrf": csrf_token(session),
        "rounds": found,
        "readers": [user.name for user in list_users(state.store) if not user.disabled] or [session.user_name],
        "labels": labels,
        "reasons": REASONS,
        "flags": FLAGS,
        "decisions": list(Decision),
        "seed": secrets.randbelow(10**6),
    }
    return state.templates.TemplateResponse(request, "rounds.html", values)


@router.post("/rounds")
async def make_round(request: Request, session: LoggedIn) -> Response:
    require_admin(session)
    state = state_of(request)
    form = await request.form(max_fields=200)
    fields = {key: value for key, value in form.items() if isinstance(value, str)}
    filters = filters_of(fields)
    new = NewRound(
        name=fields.get("name", "").strip()[:200],
        readers=tuple(str(each)[:200] for each in form.getlist("readers")),
        filters=replace(filters, sort="uncertain"),
        filter_json=json.dumps({"query": as_query(filters), "stratified": fields.get("stratified") == "1"}),
        size=_number(fields, "size", 100, 1, 20_000),
        reads_per_image=_number(fields, "reads_per_image", 2, 1, 3),
        blinded=fields.get("blinded") == "1",
        stratified=fields.get("stratified") == "1",
        repeat_share=_number(fields, "repeat_percent", 0, 0, 50) / 100,
        seed=_number(fields, "seed", 0, 0, 2**62),
    )
    known = {user.name for user in await run_in_threadpool(list_users, state.store)} or {session.user_name}
    if not set(new.readers) <= known:
        raise HTTPException(400, "A reader of the round is no user.")
    round_id = await run_in_threadpool(create_round, state.store, new, session.user_name)
    await run_in_threadpool(write_audit, state.store, session.user_name, "round_made", detail=f"round {round_id}")
    return RedirectResponse(f"/rounds/{round_id}", 303)


def _number(fields: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = fields.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise HTTPException(400, f"{name.replace('_', ' ').capitalize()} is a number from {least} to {most}.")
    return int(text)


@router.get("/rounds/{round_id}")
def round_page(request: Request, round_id: RoundId, session: LoggedIn) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        found = _round(connection, round_id)
        progress = progress_of(connection, round_id)
        may_decide = _may_decide(session, found, [each.reader for each in progress])
        disputed = disputed_images(connection, round_id) if may_decide else []
    chosen = json.loads(found.filter_json)
    values = {
        "session": session,
        "csrf": csrf_token(session),
        "round": found,
        "progress": progress,
        "mine": next((each for each in progress if each.reader == session.user_name), None),
        "may_decide": may_decide,
        "disputed": disputed,
        "query": chosen.get("query", ""),
        "stratified": chosen.get("stratified", False),
    }
    return state.templates.TemplateResponse(request, "round.html", values)


def _may_decide(session: Session, found: AnyRow, readers: list[str]) -> bool:
    """An administrator; one who also reads in a blinded round, once it is closed."""
    hidden = found.blinded and found.closed_at is None and session.user_name in readers
    return session.is_admin and not hidden


@router.post("/rounds/{round_id}/close")
def close(request: Request, round_id: RoundId, session: LoggedIn) -> Response:
    require_admin(session)
    state = state_of(request)
    with connect(state.store.engine) as connection:
        _round(connection, round_id)
    close_round(state.store, round_id)
    write_audit(state.store, session.user_name, "round_closed", detail=f"round {round_id}")
    return RedirectResponse(f"/rounds/{round_id}", 303)


@router.get("/rounds/{round_id}/read")
def read_on(request: Request, round_id: RoundId, session: LoggedIn) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        _round(connection, round_id)
        position = first_unread(connection, round_id, session.user_name)
    return RedirectResponse(f"/rounds/{round_id}/read/{position}" if position else f"/rounds/{round_id}", 303)


@router.get("/rounds/{round_id}/read/{position}")
def read_page(request: Request, round_id: RoundId, position: Position, session: LoggedIn) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        _item(connection, round_id, session.user_name, position)
    values = {"session": session, "csrf": csrf_token(session), "round_id": round_id, "position": position}
    return state.templates.TemplateResponse(request, "image.html", values | {"part": "read"})


@router.get("/api/rounds/{round_id}/read/{position}")
def read_state(request: Request, round_id: RoundId, position: Position, session: LoggedIn) -> Response:
    """The image at a reader's position; of a blinded round nothing that the model or another reader said."""
    state = state_of(request)
    with connect(state.store.engine) as connection:
        found, item, total = _item(connection, round_id, session.user_name, position)
        now = state.store.now(connection)
        mine = None if item.action is None else {"action": item.action, "label": item.label}
        if found.blinded and found.closed_at is None:
            shown, document = blinded_state(item.image_id, newest_cascade(connection), now)
        else:
            image = review_image(connection, item.image_id)
            if image is None or is_hidden(connection, session.user_name, item.image_id):
                raise HTTPException(403, "This image is in a blinded round too, which has to be closed first.")
            shown, document = open_state(connection, image, session.user_name, now)
        shown = replace(shown, round_id=round_id, repeat=item.repeat)
        after = first_unread(connection, round_id, session.user_name, position)
    document |= {
        "mine": mine,
        "name": f"Image {position} of {total}" if found.blinded else document["name"],
        "place": f"{found.name}: {position} of {total}",
        "closed": found.closed_at is not None,
        "next": [each for each in (position + 1, position + 2) if each <= total],
        "unread": after if after != position else None,
        "previous": [position - 1] if position > 1 else [],
    }
    return JSONResponse(document | signed(session, shown))


def _item(connection: Connection, round_id: int, reader: str, position: int) -> tuple[AnyRow, AnyRow, int]:
    found = _round(connection, round_id)
    item = assignment(connection, round_id, reader, position)
    if item is None:
        raise HTTPException(403, "This image of the round is not yours to read.")
    total = next(each.total for each in progress_of(connection, round_id) if each.reader == reader)
    return found, item, total


@router.get("/rounds/{round_id}/decide/{image_id}")
def decide_page(request: Request, round_id: RoundId, image_id: RoundId, session: LoggedIn) -> Response:
    state = state_of(request)
    _decidable(state, session, round_id, image_id)
    values = {"session": session, "csrf": csrf_token(session), "round_id": round_id, "position": image_id}
    return state.templates.TemplateResponse(request, "image.html", values | {"part": "decide"})


@router.get("/api/rounds/{round_id}/decide/{image_id}")
def decide_state(request: Request, round_id: RoundId, image_id: RoundId, session: LoggedIn) -> Response:
    """An image for adjudication, with what its readers said."""
    state = state_of(request)
    _decidable(state, session, round_id, image_id)
    with connect(state.store.engine) as connection:
        image = review_image(connection, image_id)
        if image is None:
            raise HTTPException(404, "There is no such image.")
        shown, document = open_state(connection, image, session.user_name, state.store.now(connection))
        disputed = disputed_images(connection, round_id)
        found = _round(connection, round_id)
    document |= {
        "place": f"{found.name}: {len(disputed)} to decide",
        "next": [each for each in disputed if each > image_id][:2]
        or [each for each in disputed if each != image_id][:1],
        "previous": [each for each in disputed if each < image_id][-1:],
        "deciding": True,
    }
    return JSONResponse(document | signed(session, replace(shown, round_id=round_id, adjudication=True)))


def _decidable(state: State, session: Session, round_id: int, image_id: int) -> None:
    require_admin(session)
    with connect(state.store.engine) as connection:
        found = _round(connection, round_id)
        readers = [each.reader for each in progress_of(connection, round_id)]
        if not _may_decide(session, found, readers) or is_hidden(connection, session.user_name, image_id):
            raise HTTPException(403, "You read in this blinded round: close it before you decide.")
        if not in_round(connection, round_id, image_id):
            raise HTTPException(404, "This image is not in the round.")


def _round(connection: Connection, round_id: int) -> Any:
    found = round_of(connection, round_id)
    if found is None:
        raise HTTPException(404, "There is no such round.")
    return found
