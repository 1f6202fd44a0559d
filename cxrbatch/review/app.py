"""The web app: routes, security headers, and what an error looks like."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from cxrbatch import __version__, unexpected
from cxrbatch.errors import Fatal, Rejected, StoreDown
from cxrbatch.review import images, login, overlay, reports, rounds, work_list
from cxrbatch.review.auth import LoginNeeded, csrf_token, session_if_any, set_session_cookie
from cxrbatch.review.state import State

__all__ = ["create_app", "make_templates"]

_HERE = Path(__file__).parent
_MOST_BODY = 256 * 1024  # bytes of a request: forms and acts are small

# Not no-referrer: browsers send `Origin: null` with forms then, and the check of it would refuse our own.
#: No inline script or style anywhere, nothing from another host, no frames.
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def make_templates() -> Jinja2Templates:
    templates = Jinja2Templates(directory=_HERE / "templates")
    templates.env.globals["version"] = __version__
    templates.env.filters["words"] = lambda text: [word for word in (text or "").split(",") if word]
    templates.env.filters["plain"] = lambda text: str(text or "").replace("_", " ")
    return templates


def create_app(state: State) -> FastAPI:
    """The app over an open store. The caller closes the store and the decoder."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, title="cxrbatch review")
    app.state.review = state
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
    for module in (login, work_list, images, overlay, rounds, reports):
        app.include_router(module.router)
    app.add_middleware(BaseHTTPMiddleware, dispatch=_guarded)
    app.add_exception_handler(LoginNeeded, _to_login)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(Rejected, _rejected)
    app.add_exception_handler(Fatal, _fatal)
    app.add_exception_handler(StoreDown, _store_down)
    return app


async def _guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    length = request.headers.get("content-length", "0")
    if request.method not in ("GET", "HEAD") and (not length.isdigit() or int(length) > _MOST_BODY):
        response: Response = JSONResponse({"detail": "The request is too large."}, 413)
    elif request.method == "POST" and "content-length" not in request.headers:
        response = JSONResponse({"detail": "The request has no length."}, 411)
    else:
        try:
            response = await call_next(request)
        except Exception as error:  # a bug: what it quotes stays out of page and log
            unexpected.report(error)
            response = await _error(request, 500, "This is a fault of cxrbatch, and noted in its log. Try again.")
    for name, value in _HEADERS.items():
        response.headers[name] = value
    if request.url.path.startswith("/static/"):
        response.headers["Cache-Control"] = "no-cache"
    else:
        response.headers.setdefault("Cache-Control", "no-store")
    session = getattr(request.state, "new_session", None)
    if session is not None:
        set_session_cookie(request, response, session)
    return response


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")  # also what answers a form


async def _error(request: Request, status: int, sentence: str) -> Response:
    if _wants_page(request):
        state: State = request.app.state.review
        session = await session_if_any(request)
        values = {"sentence": sentence, "session": session, "csrf": csrf_token(session) if session else ""}
        return state.templates.TemplateResponse(request, "error.html", values, status)
    return JSONResponse({"detail": sentence}, status)


async def _to_login(request: Request, _: Exception) -> Response:
    if _wants_page(request):
        return RedirectResponse("/login", 303)
    return JSONResponse({"detail": "You are not logged in (any more): log in, and come back to this image."}, 401)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = "There is no such page." if error.status_code == 404 and error.detail == "Not Found" else error.detail
    return await _error(request, error.status_code, str(detail))


async def _not_understood(request: Request, error: Exception) -> Response:
    # FastAPI's own answer repeats what was sent.
    return await _error(request, 422, "The request is not understood: go back and try again.")


async def _rejected(request: Request, error: Exception) -> Response:
    assert isinstance(error, Rejected)
    return await _error(request, 409, error.reason)


async def _fatal(request: Request, error: Exception) -> Response:
    return await _error(request, 400, str(error))


async def _store_down(request: Request, error: Exception) -> Response:
    return await _error(request, 503, f"{str(error).rstrip('.')}. Nothing was kept: try again.")
