"""The page at `/`: static files without a build step, that load nothing from elsewhere. They hold nothing of the service's,
so they need no key; the page asks for one when the service does."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # an upgrade changes it
}
PATHS = ("", "/", *(f"/page/{name}" for name in _TYPES if name != "index.html"))


def add_routes(app: FastAPI) -> None:
    """Add the page and its files, each by its own path: no name of a client's ever names a file."""

    def serve(name: str) -> None:
        content = (_FOLDER / name).read_bytes()

        async def file() -> Response:
            return Response(content, media_type=_TYPES[name], headers=_HEADERS)

        path = "/" if name == "index.html" else f"/page/{name}"
        app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)

    for name in _TYPES:
        serve(name)
