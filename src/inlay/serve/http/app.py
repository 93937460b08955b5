"""The application: every endpoint, and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import inlay

from .adapters import AdapterRoutes
from .experiments import ExperimentRoutes
from .guard import key_of
from .page import add_page
from .problems import Json, Problem, problem_of
from .service import Service
from .writing import WritingRoutes

__all__ = ["make_routes"]

PLACE = 60
"""Characters of a wrong field's path that are said."""


def make_routes(service: Service) -> FastAPI:
    """The ASGI application that answers; a `Guard` stands before it, and says who asks."""
    app = FastAPI(title="Inlay", version=inlay.__version__, docs_url=None, redoc_url=None)
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _refused)
    writing, adapters, health = WritingRoutes(service), AdapterRoutes(service), HealthRoutes(service)
    experiments = ExperimentRoutes(service)
    routes: list[tuple[str, str, Any]] = [
        ("POST", "/v1/completions", writing.completions),
        ("POST", "/v1/chat/completions", writing.chat),
        ("POST", "/v1/classify", adapters.classify),
        ("GET", "/v1/models", adapters.models),
        ("GET", "/v1/models/{name:path}", adapters.model),
        ("GET", "/v1/adapters", adapters.adapters),
        ("POST", "/v1/load_lora_adapter", adapters.load),
        ("POST", "/v1/unload_lora_adapter", adapters.unload),
        ("GET", "/v1/experiments", experiments.all),
        ("GET", "/v1/experiments/{name:path}", experiments.one),
        ("PUT", "/v1/experiments/{name:path}", experiments.put),
        ("DELETE", "/v1/experiments/{name:path}", experiments.drop),
        ("POST", "/v1/feedback", experiments.feedback),
        ("GET", "/healthz", health.alive),
        ("GET", "/readyz", health.ready),
        ("GET", "/metrics", health.metrics),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    add_page(app)
    return app


class HealthRoutes:
    """What those ask who run the server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def alive(self) -> Any:
        """Whether the engine's thread runs."""
        alive = self.service.engine.alive
        return Json({"status": "alive" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def ready(self) -> Any:
        """Whether requests are taken."""
        ready = self.service.engine.ready and not self.service.draining
        return Json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Any:
        """Counts and times, for Prometheus."""
        if not key_of(request).admin:
            raise Problem(403, "metrics name all adapters and need an admin's key", "not_admin")
        return Response(self.service.tallies.page(), media_type="text/plain; version=0.0.4")


async def _refused(request: Request, error: Exception) -> Any:
    """Any error, in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        return _of_fields(error).answer()
    if isinstance(error, HTTPException) and not isinstance(error, Problem):
        said = {404: f"there is no {request.url.path[:PLACE]} here", 405: f"{request.method} is not taken here"}
        return Problem(
            error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers
        ).answer()
    return problem_of(error).answer()


def _of_fields(error: RequestValidationError) -> Problem:
    """The first field that is wrong; what the field holds is not said again."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:PLACE]
    if first["type"] == "extra_forbidden":
        return Problem(400, f"the field {place!r} is not known here. Leave it out.", "unknown_field", place)
    if first["type"] == "json_invalid":
        return Problem(400, "the body is not JSON")
    said = f"{place}: {first['msg']}" if place else f"the body is wrong: {first['msg']}"
    return Problem(400, said, param=place or None)
