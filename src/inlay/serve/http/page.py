"""The page at /: files of the package, as they are. What they show they ask of the server's own interface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.responses import Response

__all__ = ["PATHS", "add_page"]

SCRIPTS = ("adapters", "api", "chat", "classify", "dom", "experiments", "page")
PATHS = {"/": "page.html", "/page/page.css": "page.css", **{f"/page/{name}.js": f"{name}.js" for name in SCRIPTS}}
"""The file at each path. They hold nothing that is worth a key: whoever has none is asked for it there."""
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache", "Cross-Origin-Opener-Policy": "same-origin", "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
}  # fmt: skip
"""Only the own files run, and only the own server is asked: no word of an adapter or an answer becomes a script."""


def add_page(app: Any) -> None:
    """Let a FastAPI application answer with the page and its files."""
    folder = files("inlay.serve") / "page"
    for path, name in PATHS.items():
        kind = KINDS[name.rpartition(".")[2]]
        app.add_route(path, _sends((folder / name).read_bytes(), kind), include_in_schema=False)


def _sends(body: bytes, kind: str) -> Callable[[Any], Awaitable[Response]]:
    async def send(request: Any) -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return send
