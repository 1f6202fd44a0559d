"""The heat map of an image, where there is one and the reader may see it."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import JSONResponse, Response

from cxrbatch.review.auth import LoggedIn
from cxrbatch.review.images import ImageId
from cxrbatch.review.state import state_of
from cxrbatch.store import text_to_path
from cxrbatch.store.connection import connect
from cxrbatch.store.review_images import is_hidden, review_image, source_of

__all__ = ["router"]

router = APIRouter()


@router.get("/api/images/{image_id}/overlay")
def overlay(request: Request, image_id: ImageId, session: LoggedIn) -> Response:
    """What moved the score (Grad-CAM), as a small grid of 0..1."""
    state = state_of(request)
    with connect(state.store.engine) as connection:
        if is_hidden(connection, session.user_name, image_id):
            raise HTTPException(403, "The heat map is not shown in a blinded round.")
        found, source = review_image(connection, image_id), source_of(connection, image_id)
    if found is None:
        raise HTTPException(404, "There is no such image.")
    if source is None or found.cascade is None or not found.scores:
        raise HTTPException(404, "The heat map is not available: the disease model did not score this image.")
    made = state.heat_maps.heat_map(text_to_path(source.path), source.sha256, found.cascade.manifest_sha256)
    return JSONResponse(made)
