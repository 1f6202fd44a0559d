"""What the web app works with: settings, store, decoder, templates."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from starlette.templating import Jinja2Templates

from cxrbatch.review.decoding import ImageDecoder
from cxrbatch.review.overlay_process import HeatMaps
from cxrbatch.settings import Settings
from cxrbatch.store import Store

__all__ = ["State", "state_of"]


@dataclass(frozen=True, slots=True)
class State:
    """Made once at the start of the server."""

    settings: Settings
    store: Store
    decoder: ImageDecoder
    heat_maps: HeatMaps
    templates: Jinja2Templates
    local_key: str = ""  # opens the review on this machine while there are no users; empty: it does not
    local_user: str = ""


def state_of(request: Request) -> State:
    state: State = request.app.state.review
    return state
