"""Clients of a server that is measured: what they ask, what comes when, and what may come."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
from serve_parts import Running

__all__ = ["Answer", "Claims", "ask", "client_of", "shares"]


@dataclass
class Answer:
    """What came for one request; times in seconds of `time.perf_counter`."""

    model: str
    sent: float
    ended: float = 0.0
    status: int = 0
    text: str = ""
    tokens: int = 0
    problem: str = ""
    marks: list[float] = field(default_factory=list)
    """When each piece of the text came."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return (self.marks[0] if self.marks else self.ended) - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.marks)]

    def complete(self, tokens: int) -> bool:
        return self.status == 200 and not self.problem and self.tokens == tokens


async def ask(
    http: httpx.AsyncClient, model: str, prompt: Any, tokens: int, stream: bool = True, leave: int = 0, **more: Any
) -> Answer:  # fmt: skip
    """Ask for `tokens` tokens behind a prompt (ids or words); with `leave` hang up after so many pieces."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}), **more,
    }  # fmt: skip
    answer = Answer(model, time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            answer.status = reply.status_code
            if stream and reply.status_code == 200:
                await _read_events(reply, answer, leave)
            else:
                _whole(json.loads(await reply.aread()), answer)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.problem = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    return answer


def _whole(said: Mapping[str, Any], answer: Answer) -> None:
    if answer.status != 200:
        answer.problem = said["error"]["message"]
        return
    answer.text, answer.tokens = said["choices"][0]["text"], said["usage"]["completion_tokens"]


async def _read_events(reply: httpx.Response, answer: Answer, leave: int) -> None:
    ended = False
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            ended = True
            continue
        said = json.loads(line[6:])
        if "error" in said:
            answer.problem = said["error"]["message"]
        elif said.get("usage"):
            answer.tokens = said["usage"]["completion_tokens"]
        elif said["choices"] and said["choices"][0]["text"]:
            answer.marks.append(time.perf_counter())
            answer.text += said["choices"][0]["text"]
            if leave and len(answer.marks) >= leave:
                return
    if not ended:
        answer.problem = answer.problem or "the stream broke off"


def shares(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return {name: 1e3 * cuts[at] for name, at in (("p50", 49), ("p95", 94), ("p99", 98))} if cuts else {}


class Claims:
    """What each name may say, and when: `change` is entered while it becomes another word, or nothing (None).

    A request may be answered with any word that its name had between its sending and its end.
    """

    def __init__(self) -> None:
        self.spans: dict[str, list[list[Any]]] = {}

    @contextmanager
    def change(self, name: str, word: str | None) -> Iterator[None]:
        spans = self.spans.setdefault(name, [[None, 0.0, float("inf")]])
        spans.append([word, time.perf_counter(), float("inf")])
        yield
        spans[-2][2] = time.perf_counter()

    def now(self) -> list[str]:
        """The names that say something."""
        return [name for name, spans in self.spans.items() if spans[-1][0] is not None]

    def may(self, answer: Answer) -> list[str | None]:
        """What the name may have said."""
        spans = self.spans[answer.model]
        return [word for word, begun, ended in spans if begun <= answer.ended and ended >= answer.sent]


def client_of(server: Running, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    headers = {"authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300, limits=limits)
