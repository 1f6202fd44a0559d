"""One image: the page, its state, its pixels, and what the reader does with it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from cxrbatch.intake.remote import is_remote
from cxrbatch.review.auth import LoggedIn, csrf_token, sign, signature_holds
from cxrbatch.review.filters import as_query, filters_of
from cxrbatch.review.image_state import Shown, choices, open_state, parse_shown
from cxrbatch.review.pixels import ViewRequest
from cxrbatch.review.state import State, state_of
from cxrbatch.store import Act, ReviewAction, record_act, text_to_path
from cxrbatch.store.connection import connect
from cxrbatch.store.review_images import (
    is_hidden,
    newest_cascade,
    review_image,
    source_of,
    take_lease,
    write_audit,
)
from cxrbatch.store.reviews import SPECIAL_LABELS
from cxrbatch.store.rounds import round_of
from cxrbatch.store.users import Session
from cxrbatch.store.work_list import Cursor, Filters, page, rows_of

__all__ = ["router"]

router = APIRouter()
ImageId = Annotated[int, Path(ge=1, lt=2**63)]
Size = Literal["reduced", "full"]
_AHEAD = 3  # images that follow, of which the browser loads two

_HIDDEN = "This image is in a blinded round that you read in: it is shown there alone until the round is closed."
_IN_BUCKET = "This image lies in a bucket: the review shows images of files alone."
_GONE = "No file holds this image any more: it was moved, removed or overwritten."


@router.get("/images/{image_id}")
def image_page(request: Request, image_id: ImageId, session: LoggedIn) -> Response:
    state = state_of(request)
    _found(state, session, image_id)
    values = {
        "session": session,
        "csrf": csrf_token(session),
        "image_id": image_id,
        "query": as_query(filters_of(request.query_params)),
    }
    return state.templates.TemplateResponse(request, "image.html", values)


@router.get("/api/images/{image_id}")
def image_state(request: Request, image_id: ImageId, session: LoggedIn) -> Response:
    """Everything about an image, its neighbours in the filtered list, and what is shown of it, signed."""
    state = state_of(request)
    filters = filters_of(request.query_params)
    with connect(state.store.engine) as connection:
        found = None if is_hidden(connection, session.user_name, image_id) else review_image(connection, image_id)
        if found is None:
            raise _not_found(state, session, image_id)
        shown, document = open_state(connection, found, session.user_name, state.store.now(connection))
        place = None
        if found.file is not None and found.file.confidence is not None:
            key = found.file.processed_at if filters.sort == "newest" else found.file.confidence
            place = Cursor(key, found.file.id)
        if place is not None:
            document |= _neighbours(connection, filters, session.user_name, place, image_id)
    return JSONResponse(document | signed(session, shown))


def signed(session: Session, shown: Shown) -> dict[str, str]:
    text = shown.text()
    return {"shown": text, "signature": sign(session, text)}


def _neighbours(connection: Any, filters: Filters, reader: str, place: Cursor, image_id: int) -> dict[str, Any]:
    after = page(connection, filters, reader, _AHEAD, after=place)
    before = page(connection, filters, reader, 1, before=place)
    ids = {row.id: row.image_id for row in rows_of(connection, [*after.file_ids, *before.file_ids])}
    following = [ids[i] for i in after.file_ids if i in ids and ids[i] != image_id]
    preceding = [ids[i] for i in before.file_ids if i in ids and ids[i] != image_id]
    return {"next": following, "previous": preceding[:1]}


@router.get("/api/images/{image_id}/pixels")
def image_pixels(request: Request, image_id: ImageId, session: LoggedIn, size: Size = "reduced") -> Response:
    """Stored values as uint16 (pixels.as_body). The only source is a file of the store whose sha256 is the image's."""
    state = state_of(request)
    with connect(state.store.engine) as connection:
        source = source_of(connection, image_id)
        if source is None:
            raise HTTPException(404, _GONE if review_image(connection, image_id) else "There is no such image.")
    if is_remote(source.path):
        raise HTTPException(404, _IN_BUCKET)
    write_audit(state.store, session.user_name, "pixels_sent", path=source.path, detail=f"image {image_id}, {size}")
    file = ViewRequest(
        text_to_path(source.path), source.size, source.mtime_ns, 0, sha256=source.sha256, reduced=size != "full"
    )
    return Response(state.decoder.body(file), media_type="application/octet-stream")


@router.post("/api/images/{image_id}/opened")
def image_opened(request: Request, image_id: ImageId, session: LoggedIn) -> Response:
    """The reader has the image before them: noted in audit, with a lease; says who else has it open."""
    state = state_of(request)
    with connect(state.store.engine, write=True) as connection:
        found = review_image(connection, image_id)
        if found is None:
            raise HTTPException(404, "There is no such image.")
        other = take_lease(connection, state.store, image_id, session.user_name)
        now = state.store.now(connection)
        hidden = is_hidden(connection, session.user_name, image_id)
    path = found.file.path if found.file is not None else None
    write_audit(state.store, session.user_name, "viewed", path=path, detail=f"image {image_id}")
    return JSONResponse({"open_by": "" if hidden else other, "opened_at": now.isoformat()})


class ActBody(BaseModel):
    """What the browser sends when a key is pressed."""

    act_id: str = Field(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9-]+$")
    action: ReviewAction
    label: str | None = Field(None, max_length=100)
    comment: str = Field("", max_length=4000)
    active_ms: int = Field(0, ge=0, le=24 * 3600 * 1000)
    shown: str = Field(max_length=2000)
    signature: str = Field(max_length=64)


@router.post("/api/acts")
def act(request: Request, body: ActBody, session: LoggedIn) -> Response:
    """Record what the reader did. The same act_id again changes nothing and gets the same answer."""
    state = state_of(request)
    if not signature_holds(session, body.shown, body.signature):
        raise HTTPException(409, "This page is of another session: load it again.")
    shown = parse_shown(body.shown)
    given = Act(
        act_id=body.act_id,
        image_id=shown.image_id,
        reviewer=session.user_name,
        action=body.action,
        label=body.label,
        comment=body.comment.replace("\0", ""),  # which Postgres cannot keep
        shown_label=shown.label,
        shown_confidence=shown.confidence,
        shown_cascade_id=shown.cascade_id,
        blinded=shown.blinded,
        adjudication=shown.adjudication,
        round_id=shown.round_id,
        repeat=shown.repeat,
        opened_at=datetime.fromisoformat(shown.opened_at),
        active_ms=body.active_ms,
    )
    if shown.round_id and not shown.adjudication:
        with connect(state.store.engine) as connection:
            found_round = round_of(connection, shown.round_id)
        if found_round is None or found_round.closed_at is not None:
            raise HTTPException(409, "This round is closed: nothing more can be read in it.")
    if given.action == ReviewAction.OVERRIDE:
        with connect(state.store.engine) as connection:
            found = review_image(connection, shown.image_id)
            # The newest bundle's classes are what a blinded reader is offered, whichever bundle scored the image.
            bundles = (found.cascade if found else None, newest_cascade(connection))
            known = {choice["label"] for bundle in bundles for choice in choices(bundle, [])}
        if given.label not in known | set(SPECIAL_LABELS):
            raise HTTPException(400, "There is no such label.")
        if given.label == shown.label and not shown.blinded:
            given = replace(given, action=ReviewAction.ACCEPT)
    recorded = record_act(state.store, given)
    answer: dict[str, Any] = {"again": recorded.again}
    if not shown.blinded:
        answer |= {"status": recorded.status, "label": recorded.label, "others": list(recorded.others)}
    return JSONResponse(answer)


def _found(state: State, session: Session, image_id: int) -> None:
    with connect(state.store.engine) as connection:
        if is_hidden(connection, session.user_name, image_id) or review_image(connection, image_id) is None:
            raise _not_found(state, session, image_id)


def _not_found(state: State, session: Session, image_id: int) -> HTTPException:
    with connect(state.store.engine) as connection:
        if is_hidden(connection, session.user_name, image_id):
            return HTTPException(403, _HIDDEN)
    return HTTPException(404, "There is no such image; it may have been pruned.")
