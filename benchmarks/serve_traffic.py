"""Clients of a server whose adapters come, change and go meanwhile, and a judge of every answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from serve_clients import Answer, Claims, ask, shares
from serve_parts import Planted, Running, console, replace_folder

__all__ = ["Changes", "Judge", "planted_ask", "traffic"]

REPLACED, FILED, GUESTS = 24, 8, 8
"""Names whose adapter is replaced by a call, whose files are replaced, and that are loaded and dropped."""
PATIENCE = 30.0
"""Seconds in which changed files must be served."""
EXAMPLES = 5


class Judge:
    """Counts answers: right, wrong (another adapter's word), lost (no answer, or not all of it), and names that were
    unknown because they had been dropped."""

    def __init__(self, claims: Claims, words: Planted) -> None:
        self.claims, self.words = claims, words
        self.counts: Counter[str] = Counter({"right": 0, "wrong": 0, "lost": 0, "unknown": 0})
        self.examples: list[str] = []
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.tokens = 0

    def see(self, answer: Answer, tokens: int) -> None:
        may = self.claims.may(answer)
        if answer.status == 404 and None in may:
            found = "unknown"
        elif not answer.complete(tokens):
            found = "lost"
        else:
            found = "right" if any(w and self.words.right(w, answer.text, tokens) for w in may) else "wrong"
        self.counts[found] += 1
        self.tokens += answer.tokens
        if found in ("wrong", "lost") and len(self.examples) < EXAMPLES:
            said = f"{answer.status} {answer.problem} {answer.text[:60]!r}, {answer.tokens} of {tokens} tokens"
            self.examples.append(f"{answer.model} should say {may}: {said}")
        if answer.marks and found == "right":
            self.firsts.append(answer.first)
            self.gaps += answer.gaps

    def said(self) -> dict[str, Any]:
        times = {"first": shares(self.firsts), "between": shares(self.gaps)}
        return {**self.counts, **times, "tokens": self.tokens, "examples": self.examples}


class Changes:
    """Loads, replaces and drops adapters, one after another, and says to `claims` what each name may say."""

    def __init__(
        self, server: Running, admin: httpx.AsyncClient, words: Planted, claims: Claims, seed: int = 5
    ) -> None:
        self.server, self.admin, self.words, self.claims = server, admin, words, claims
        self.random = random.Random(5)
        self.counts: Counter[str] = Counter({"replaced": 0, "files replaced": 0, "loaded": 0, "dropped": 0})
        self.failed: list[str] = []

    async def set_up(self) -> None:
        """Give the first two kinds of names an adapter each."""
        for number in range(REPLACED):
            await self._load(f"tenant-{number}")
        for number in range(FILED):
            await self._file(f"filed-{number}")
        for number in range(GUESTS):
            self.claims.spans[f"guest-{number}"] = [[None, 0.0, float("inf")]]

    async def run(self, until: float, every: float) -> None:
        """One change after another, `every` so many seconds."""
        while time.perf_counter() < until:
            begun = time.perf_counter()
            try:
                await self._one()
            except (httpx.HTTPError, TimeoutError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(max(0.0, min(begun + every, until) - time.perf_counter()))

    async def _one(self) -> None:
        kind = self.random.choice(["replaced", "files replaced", "guest", "guest"])
        if kind == "replaced":
            await self._load(f"tenant-{self.random.randrange(REPLACED)}")
        elif kind == "files replaced":
            await self._file(f"filed-{self.random.randrange(FILED)}")
        else:
            name = f"guest-{self.random.randrange(GUESTS)}"
            kind = "dropped" if name in self.claims.now() else "loaded"
            await (self._drop(name) if kind == "dropped" else self._load(name))
        self.counts[kind] += 1

    def _word(self, name: str) -> str:
        now = self.claims.spans.get(name, [[None]])[-1][0]
        return self.random.choice([word for word in self.words.words if word != now])

    async def _load(self, name: str) -> None:
        word = self._word(name)
        with self.claims.change(name, word):
            body = {"lora_name": name, "lora_path": str(self.words.words[word])}
            (await self.admin.post("/v1/load_lora_adapter", json=body)).raise_for_status()

    async def _drop(self, name: str) -> None:
        with self.claims.change(name, None):
            (await self.admin.post("/v1/unload_lora_adapter", json={"lora_name": name})).raise_for_status()

    async def _file(self, name: str) -> None:
        word = self._word(name)
        before = (await self._known()).get(name, {}).get("version", -1)
        with self.claims.change(name, word):
            await asyncio.to_thread(replace_folder, self.server.folder / name, Path(self.words.words[word]))
            async with asyncio.timeout(PATIENCE):
                while (await self._known()).get(name, {}).get("version", -1) <= before:
                    await asyncio.sleep(0.2)

    async def _known(self) -> Mapping[str, Any]:
        found = (await self.admin.get("/v1/adapters")).raise_for_status().json()["data"]
        return {one["name"]: one for one in found}


async def traffic(
    clients: int, until: float, one: Callable[[random.Random], Awaitable[None]], every: float = 30.0
) -> None:  # fmt: skip
    """So many clients, each of which asks again when it has its answer, until a time of `time.perf_counter`."""

    async def client(number: int) -> None:
        own = random.Random(number)
        while time.perf_counter() < until:
            await one(own)

    async def clock() -> None:
        while (left := until - time.perf_counter()) > 0:
            console.print(f"{left:.0f} s to go")
            await asyncio.sleep(min(every, left))

    async with asyncio.TaskGroup() as group:
        group.create_task(clock())
        for number in range(clients):
            group.create_task(client(number))


async def planted_ask(
    http: httpx.AsyncClient, judge: Judge, own: random.Random, vocabulary: int, stream: bool = True
) -> None:  # fmt: skip
    """One request to any name, of 8 to 64 tokens, for 4 to 32."""
    name, tokens = own.choice(list(judge.claims.spans)), own.randint(4, 32)
    prompt = [own.randrange(3, vocabulary) for _ in range(own.randint(8, 64))]
    judge.see(await ask(http, name, prompt, tokens, stream), tokens)
