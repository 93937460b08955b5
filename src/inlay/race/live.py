"""The page of a race that is under way, on this machine alone, and what people ask through it."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs

from inlay.bases.extras import require
from inlay.data.yaml import read_yaml
from inlay.errors import InlayError, UsageError
from inlay.reporting.race_page import race_page
from inlay.runs.asking import ASKS, Ask, Requests
from inlay.runs.folder import RunFolder

from .standings import standings

__all__ = ["Live", "live_app"]

HOST = "127.0.0.1"
AGAIN = 5
"""Seconds after which the page looks anew."""
LARGEST = 10_000
"""Bytes of what a page may ask."""
WORDS = (
    "It is done after the next step. Stop: the contender leaves, its adapter stays. Continue: one that left goes on "
    "to its end. Clone: another like it enters, with other settings."
)
RELOAD = (
    "<script>setInterval(function () { var form = document.forms[0]; "
    "if (!(form && (form.contains(document.activeElement) || form.set.value)) && !String(getSelection())) "
    f"location.reload(); }}, {1000 * AGAIN});</script>"
)
"""What is being typed or marked stays."""
HEADERS = {
    "Cache-Control": "no-store", "Referrer-Policy": "same-origin", "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}  # fmt: skip


def live_app(folder: Path, port: int, token: str) -> Any:
    """A Starlette app: GET / is the page, POST /ask leaves an ask for the race.

    Other hosts than this machine's own names are refused (a page elsewhere could point a name of its own here), and
    asks without the token, which the printed link holds, or from another origin.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
    from starlette.routing import Route

    own = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def here_alone(request: Any, go_on: Callable[..., Any]) -> Any:
        if request.headers.get("host") not in own:
            return PlainTextResponse("this page is for this machine alone", 403)
        answer = await go_on(request)
        answer.headers.update(HEADERS)
        return answer

    def page(request: Any) -> Any:
        shown = race_page(folder, standings(RunFolder(str(folder))))
        return HTMLResponse(_with_forms(shown, folder, request.query_params.get("token", "")))

    async def ask(request: Any) -> Any:
        body = parse_qs((await request.body())[:LARGEST].decode("utf8", "replace"))
        origin = request.headers.get("origin")
        from_here = origin is None or origin.removeprefix("http://") in own
        code, why = _leave(folder, token, from_here, {key: values[0] for key, values in body.items()})
        return PlainTextResponse(why, code) if why else RedirectResponse(f"/?token={token}", code)

    routes = [Route("/", page), Route("/ask", ask, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=here_alone)])


def _leave(folder: Path, token: str, from_here: bool, given: Mapping[str, str]) -> tuple[int, str]:
    """Leave what a form asks for the race to find; returns the answer's code, and why it is refused."""
    if not from_here:
        return 403, "the page that asks is another one"
    if not secrets.compare_digest(given.get("token", "").encode(), token.encode()):
        return 403, "the link that the race has printed holds the token that this needs"
    try:
        Requests(RunFolder(str(folder)).requests).put(_ask(given))
    except UsageError as error:
        return 400, str(error)
    return 303, ""


def _ask(given: Mapping[str, str]) -> Ask:
    """What a form asks. Raises: UsageError."""
    settings: dict[str, Any] = {}
    for entry in given.get("set", "").split():
        key, mark, text = entry.partition("=")
        if not mark or not text:
            raise UsageError(f"{entry!r} cannot be read", "Write lr=0.001.")
        try:
            settings[key] = read_yaml(text)
        except ValueError:
            settings[key] = text
    return Ask(given.get("what", ""), given.get("name", ""), settings)


def _with_forms(page: str, folder: Path, token: str) -> str:
    """The page, which looks anew by itself; with a form where the link holds a token."""
    from markupsafe import Markup, escape

    again = Markup('<noscript><meta http-equiv="refresh" content="{}"></noscript>').format(AGAIN) + Markup(RELOAD)
    page = page.replace("</head>", f"{again}</head>", 1)
    if not token:
        return page
    names = Markup("").join(
        Markup("<option>{}</option>").format(n) for n in RunFolder(str(folder)).read().get("plans", {})
    )
    asks = Markup("").join(Markup("<option>{}</option>").format(what) for what in ASKS)
    form = Markup(
        '<form method="post" action="/ask" class="card full"><h2>Ask something of the race</h2><p class="tools">'
        '<input type="hidden" name="token" value="{token}"><select name="what" aria-label="what">{asks}</select>'
        '<select name="name" aria-label="contender">{names}</select>'
        '<input name="set" aria-label="settings of a clone" placeholder="of a clone: lr=0.001 r=16">'
        '<button>Ask</button></p><p class="place">{words}</p></form>'
    ).format(token=escape(token), asks=asks, names=names, words=WORDS)
    return page.replace("</main>", f"{form}</main>", 1)


class Live:
    """The page of the race in `folder`, served while the context is entered; `on_message` gets its link."""

    def __init__(self, folder: Path, on_message: Callable[[str], None]) -> None:
        require("starlette", "--open", "live")
        require("uvicorn", "--open", "live")
        self.folder, self.on_message = folder, on_message
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Live:
        import uvicorn

        token, opened = secrets.token_urlsafe(16), socket.socket()
        try:
            opened.bind((HOST, 0))
            opened.listen()  # who follows the link before the server has begun waits for it
        except OSError as error:
            raise InlayError(f"the live page has no port ({error.strerror or error})", "Leave --open out.") from None
        port = opened.getsockname()[1]
        config = uvicorn.Config(live_app(self.folder, port, token), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [opened]}, daemon=True)
        self._thread.start()
        self.on_message(f"live at http://{HOST}:{port}/?token={token}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(timeout=5)
