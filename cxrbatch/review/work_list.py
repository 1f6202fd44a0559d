"""The pages that list: images by filter, and files that have no score."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import RedirectResponse
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from cxrbatch.errors import ReasonCode
from cxrbatch.review.auth import LoggedIn, csrf_token
from cxrbatch.review.filters import as_query, cursor_text, filters_of, parse_cursor
from cxrbatch.review.image_state import choices
from cxrbatch.review.state import state_of
from cxrbatch.store import retry_now
from cxrbatch.store.connection import connect
from cxrbatch.store.rejected import rejected_page, retry_file
from cxrbatch.store.review_images import newest_cascade, write_audit
from cxrbatch.store.users import list_users
from cxrbatch.store.work_list import COUNT_CAP, count, page, rows_of
from cxrbatch.types import Decision

__all__ = ["FLAGS", "NOT_DISEASE_LABELS", "REASONS", "router"]

router = APIRouter()
_ROWS = 50
#: Those of inference/decision.py, which the web app does not import: tests/test_decision.py compares them.
REASONS = ("low_confidence", "possibly_abnormal", "unlike_training", "gate_unsure", "not_frontal")
FLAGS = (
    "near_constant", "saturated", "tiny", "extreme_aspect", "colour", "polarity_suspect", "window_unusable",
    "multi_frame", "decoder_warning", "above_bits_stored",
)  # fmt: skip
NOT_DISEASE_LABELS = ("NOT_CHEST", "NOT_FRONTAL")


@router.get("/")
def start(session: LoggedIn) -> Response:
    return RedirectResponse("/images?decision=needs_review&reviewed=no", 303)


@router.get("/images")
def work_list(request: Request, session: LoggedIn) -> Response:
    state = state_of(request)
    filters = filters_of(request.query_params)
    after = parse_cursor(request.query_params.get("after", ""), filters)
    before = parse_cursor(request.query_params.get("before", ""), filters)
    with connect(state.store.engine) as connection:
        found = page(connection, filters, session.user_name, _ROWS, after=after, before=before)
        rows = rows_of(connection, found.file_ids)
        total = count(connection, filters, session.user_name)
        labels = known_labels(connection)
    values: dict[str, Any] = {
        "session": session,
        "csrf": csrf_token(session),
        "filters": filters,
        "query": as_query(filters),
        "rows": rows,
        "total": f"{total:,}" if total < COUNT_CAP else f"{COUNT_CAP:,} or more",
        "next": as_query(filters, after=cursor_text(found.last)) if found.more_after else "",
        "previous": as_query(filters, before=cursor_text(found.first)) if found.more_before else "",
        "last_day": (filters.until - timedelta(days=1)).date().isoformat() if filters.until else "",
        "first_page": after is None and before is None,
        "decisions": list(Decision),
        "labels": labels,
        "reasons": REASONS,
        "flags": FLAGS,
        "readers": [user.name for user in list_users(state.store)] or [session.user_name],
    }
    name = "rows.html" if request.headers.get("x-fragment") else "list.html"
    return state.templates.TemplateResponse(request, name, values)


def known_labels(connection: Connection) -> list[str]:
    """The classes of the newest bundle, and what an image without a disease is called."""
    labels = [choice["label"] for choice in choices(newest_cascade(connection), []) if choice["key"].isdigit()]
    return [*labels, *NOT_DISEASE_LABELS]


@router.get("/rejected")
def rejected(request: Request, session: LoggedIn) -> Response:
    state = state_of(request)
    reason = request.query_params.get("reason", "")
    reason = reason if reason in set(ReasonCode) else ""
    after = request.query_params.get("after", "")
    with connect(state.store.engine) as connection:
        rows, counts, more = rejected_page(connection, reason, int(after) if _is_id(after) else 0, _ROWS)
    values = {"session": session, "csrf": csrf_token(session), "rows": rows, "counts": counts, "reason": reason}
    values |= {"next": rows[-1].id if more else "", "first_page": not after}
    return state.templates.TemplateResponse(request, "rejected.html", values)


@router.post("/rejected/retry")
async def retry(request: Request, session: LoggedIn) -> Response:
    """Another try for one file, or for every file with a reason; the watch that runs or the next scan takes it."""
    form = await request.form()
    state = state_of(request)
    file_id, reason = str(form.get("file", "")), str(form.get("reason", ""))
    if _is_id(file_id):
        number = await run_in_threadpool(retry_file, state.store, int(file_id))
    elif reason in set(ReasonCode):
        number = await run_in_threadpool(retry_now, state.store, ReasonCode(reason))
    else:
        raise HTTPException(400, "Name a file or a reason.")
    said = f"{file_id or reason}: {number} file(s)"
    await run_in_threadpool(write_audit, state.store, session.user_name, "retried", detail=said)
    return RedirectResponse(f"/rejected?reason={reason if reason in set(ReasonCode) else ''}", 303)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19
