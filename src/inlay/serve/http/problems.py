"""What is wrong, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from inlay.errors import DataError, FormatError, InlayError, UsageError
from inlay.files import finite
from inlay.serve.refusals import Busy, Forbidden, NotSettled, UnknownAdapter

__all__ = ["Json", "Problem", "dumped", "problem_of", "too_many"]

KINDS = {
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error",
}  # fmt: skip
"""By status; every other one is an invalid_request_error."""


def dumped(value: Any) -> bytes:
    """JSON (UTF-8) with null for what is no number; half a character, which no UTF-8 holds, becomes "?"."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False).encode("utf8", "replace")


class Json(Response):
    """A JSON answer of anything that a client may have sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumped(content)


class Problem(HTTPException):
    """A refusal: `status`, words for people, and OpenAI's `code` and `param`; `headers` go along."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, dict(headers or {}))
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def answer(self) -> Json:
        return Json(self.body(), self.status, self.headers)


def problem_of(error: Exception) -> Problem:
    """The refusal that an error of the engine, the tokenizer or an adapter's folder means."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownAdapter):
        return Problem(404, str(error), "model_not_found", "model")
    if isinstance(error, Forbidden):
        return Problem(403, str(error), "path_not_allowed", "lora_path")
    if isinstance(error, Busy):
        return too_many(str(error), error.retry_after)
    if isinstance(error, NotSettled):
        return Problem(503, str(error), "not_ready", "model", {"Retry-After": "1"})
    if isinstance(error, (UsageError, DataError, FormatError)):
        return Problem(400, str(error))
    if isinstance(error, InlayError):
        return Problem(500, str(error), "engine_error")
    return Problem(500, f"the server failed ({type(error).__name__}); its log says more", "internal_error")


def too_many(message: str, seconds: float) -> Problem:
    """A refusal for a while: 429 with Retry-After in whole seconds."""
    return Problem(429, message, "rate_limit_exceeded", headers={"Retry-After": str(max(1, math.ceil(seconds)))})
