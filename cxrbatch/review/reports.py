"""The reports page, and the same figures as CSV and PNG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from cxrbatch.review.auth import LoggedIn, csrf_token
from cxrbatch.review.report import Line, as_csv, as_png, lines_of
from cxrbatch.review.state import state_of
from cxrbatch.store.connection import connect
from cxrbatch.store.report_data import read_rows
from cxrbatch.store.review_images import hidden_images, write_audit
from cxrbatch.store.review_schema import NO_ROUND
from cxrbatch.store.rounds import list_rounds, progress_of
from cxrbatch.store.sql import AnyRow
from cxrbatch.store.users import Session

__all__ = ["router"]

router = APIRouter()
RoundId = Annotated[int, Query(alias="round", ge=0, lt=2**63)]
_FREE = (
    "Readers chose these images themselves, mostly those that need review: a biased sample. Do not read a prevalence, "
    "a sensitivity or a specificity of the whole population from it."
)
_FILTERED = (
    "The images of this round were chosen by a filter: its figures are of such images, not of the whole population."
)
_STRATIFIED = "This round has as many images of each label as there were: sensitivities hold, shares of labels do not."


@dataclass(frozen=True, slots=True)
class _Report:
    title: str
    warning: str
    lines: list[Line]
    rounds: list[AnyRow]
    round_id: int


@router.get("/reports")
def reports_page(request: Request, session: LoggedIn, round_id: RoundId = NO_ROUND) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        report = _report(connection, session, round_id)
    sections: dict[str, list[Line]] = {}
    for line in report.lines:
        sections.setdefault(line.section, []).append(line)
    values = {"session": session, "csrf": csrf_token(session), "report": report, "sections": sections}
    return state.templates.TemplateResponse(request, "reports.html", values)


@router.get("/reports/report.csv")
def report_csv(request: Request, session: LoggedIn, round_id: RoundId = NO_ROUND) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        report = _report(connection, session, round_id)
    write_audit(state.store, session.user_name, "exported", detail=f"report of {report.title}, CSV")
    named = {"Content-Disposition": 'attachment; filename="report.csv"'}
    return Response(as_csv(report.lines, report.warning), media_type="text/csv; charset=utf-8", headers=named)


@router.get("/reports/report.png")
def report_png(request: Request, session: LoggedIn, round_id: RoundId = NO_ROUND) -> Response:
    state = state_of(request)
    with connect(state.store.engine) as connection:
        report = _report(connection, session, round_id)
    write_audit(state.store, session.user_name, "exported", detail=f"report of {report.title}, PNG")
    return Response(as_png(report.lines, report.title), media_type="image/png")


def _report(connection: Connection, session: Session, round_id: int) -> _Report:
    """Raises 403 for a round that is open and blinded to this reader, and for a round that is not theirs."""
    rounds = [each for each in list_rounds(connection) if _may_see(connection, session, each)]
    hidden = hidden_images(connection, session.user_name)
    everything = [row for row in read_rows(connection, None) if row.image_id not in hidden]
    if round_id == NO_ROUND:
        lines = lines_of([row for row in read_rows(connection) if row.image_id not in hidden], everything)
        return _Report("reads outside rounds", _FREE, lines, rounds, round_id)
    found = next((each for each in rounds if each.id == round_id), None)
    if found is None:
        raise HTTPException(403, "There is no such round, or you may not see its report before it is closed.")
    chosen = json.loads(found.filter_json)
    warnings = [_FILTERED] if chosen.get("query") else []
    warnings += [_STRATIFIED] if chosen.get("stratified") else []
    lines = lines_of([row for row in read_rows(connection, round_id) if row.image_id not in hidden], everything)
    return _Report(str(found.name), " ".join(warnings), lines, rounds, round_id)


def _may_see(connection: Connection, session: Session, found: AnyRow) -> bool:
    reads = session.user_name in {each.reader for each in progress_of(connection, found.id)}
    if reads:
        return found.closed_at is not None or not found.blinded
    return session.is_admin
