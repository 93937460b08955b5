"""Whether a server's memory stays: mixed traffic while adapters come and go, and the process sampled meanwhile.

The server is a process of its own. Clients stream, ask for whole answers, chat, classify, ask for two answers, hang up
in the middle, name adapters that are not there, and send prompts that are too long; adapters are loaded, replaced and
dropped, and have half the memory that they would take, so that they leave it and return. Every answer that can be
judged is. Each sample is the process's resident memory after Python has collected its garbage. The first fifth does not
count; the slope is that of the means of ten blocks of what is left, with its 95% interval.

    python benchmarks/soak.py --page docs/reliability.md        20 minutes of two cores
    python benchmarks/soak.py --hours 12
    python benchmarks/soak.py --tiny --hours 0.01 --sample 1
needs: pip install -e '.[serve]' httpx
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
from pages import write_between
from serve_clients import Claims, ask, client_of
from serve_parts import Planted, Running, planted, running, tiny_base
from serve_traffic import Changes, Judge, planted_ask, traffic

CLIENTS, WORDS = 32, 32
BLOCKS, T = 10, 2.306
"""Blocks of samples, and Student's t of 95% with two fewer degrees of freedom."""
WARM = 0.2
"""The share of the time that does not count."""
FLAT = 0.02
"""Of its memory a server may grow so much over the time that is measured."""
STORE = "512MB"
"""For keys and values: a server has all of it once it has been busy."""
MB = 2**20
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
KINDS = {
    "stream": 40, "whole": 20, "hang up": 10, "chat": 8, "two answers": 6, "classify": 6, "unknown": 5, "too long": 5,
}  # fmt: skip
"""Kinds of requests, and how many of a hundred are such."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="a name or a folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny random base, for a quick try")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hours", type=float, default=1 / 3)
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one change of adapters to the next")
    parser.add_argument("--sample", type=float, default=5.0, help="seconds from one sample of memory to the next")
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_name("soak.json"))
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    return parser.parse_args()


class Mixed:
    """Requests of all kinds; `odd` are answers of another status than theirs should have."""

    def __init__(self, http: httpx.AsyncClient, judge: Judge, size: int) -> None:
        self.http, self.judge, self.size = http, judge, size
        self.counts: Counter[str] = Counter()
        self.odd: list[str] = []

    async def one(self, own: random.Random) -> None:
        kind = own.choices(list(KINDS), list(KINDS.values()))[0]
        self.counts[kind] += 1
        if kind in ("stream", "whole"):
            await planted_ask(self.http, self.judge, own, self.size, kind == "stream")
            return
        name = own.choice(self.judge.claims.now())
        prompt = [own.randrange(3, self.size) for _ in range(24)]
        if kind == "hang up":
            await ask(self.http, name, prompt, 32, leave=own.randint(1, 8))
            return
        try:
            found, fine = await self._other(kind, name, prompt)
        except httpx.HTTPError as error:
            self.odd.append(f"{kind}: {type(error).__name__} {error}")
            return
        if found.status_code not in fine:
            self.odd.append(f"{kind}: {found.status_code} {found.text[:200]}")

    async def _other(self, kind: str, name: str, prompt: list[int]) -> tuple[httpx.Response, tuple[int, ...]]:
        """What came, and the statuses that are right; a guest may have been dropped meanwhile."""
        more: dict[str, Any] = {"model": name, "max_tokens": 8}
        if kind == "chat":
            body = more | {"messages": [{"role": "user", "content": "Is it a good film?"}]}
            return await self.http.post("/v1/chat/completions", json=body), (200, 404)
        if kind == "classify":
            labelled = next(word for word in self.judge.words.words if len(word) % 2)
            return await self.http.post("/v1/classify", json={"model": labelled, "input": "a good film"}), (200,)
        if kind == "two answers":
            body = more | {"prompt": prompt, "n": 2, "temperature": 1, "logprobs": 2}
            return await self.http.post("/v1/completions", json=body), (200, 404)
        if kind == "unknown":
            return await self.http.post("/v1/completions", json=more | {"model": "nobody", "prompt": prompt}), (404,)
        return await self.http.post("/v1/completions", json=more | {"prompt": prompt * 4000}), (400, 413)


async def sampled(server: Running, until: float, every: float) -> list[tuple[float, float, int, int]]:
    """Seconds since the start, resident MB after collection, open files, and threads."""
    process, begun, found = psutil.Process(server.pid), time.perf_counter(), []
    while time.perf_counter() < until:
        os.kill(server.pid, signal.SIGUSR1)
        await asyncio.sleep(0.3)
        files, threads = process.num_fds(), process.num_threads()
        found.append((time.perf_counter() - begun, process.memory_info().rss / MB, files, threads))
        await asyncio.sleep(max(0.0, min(every - 0.3, until - time.perf_counter())))
    return found


async def soaked(a: argparse.Namespace, server: Running, keys: dict[str, str], words: Planted, size: int) -> Any:
    claims = Claims()
    async with client_of(server, keys["admin"]) as admin, client_of(server, keys["clients"]) as http:
        changes, judge = Changes(server, admin, words, claims), Judge(claims, words)
        await changes.set_up()
        mixed = Mixed(http, judge, size)
        until = time.perf_counter() + 3600 * a.hours
        async with asyncio.TaskGroup() as group:
            group.create_task(changes.run(until, a.every))
            group.create_task(traffic(CLIENTS, until, mixed.one, 60.0))
            samples = group.create_task(sampled(server, until, a.sample))
    return {
        "judged": judge.said(), "kinds": dict(mixed.counts), "odd": mixed.odd[:5], "odd count": len(mixed.odd),
        "changes": dict(changes.counts), "failed": changes.failed, "samples": samples.result(),
    }  # fmt: skip


def slope_of(samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """MB an hour with its 95% interval, and the growth over the time that counts as shares of its mean. Samples beside
    each other are alike, so that blocks of them are the points. Raises: SystemExit where there are too few."""
    counted = [one for one in samples if one[0] >= WARM * samples[-1][0]] if samples else []
    if len(counted) < 2 * BLOCKS:
        raise SystemExit(f"{len(counted)} samples are too few for {BLOCKS} blocks. Sample more often, or longer.")
    cuts = [round(len(counted) * n / BLOCKS) for n in range(BLOCKS + 1)]
    blocks = [counted[a:b] for a, b in pairwise(cuts)]
    x = [statistics.fmean(one[0] / 3600 for one in block) for block in blocks]
    y = [statistics.fmean(one[1] for one in block) for block in blocks]
    slope, start = statistics.linear_regression(x, y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (BLOCKS - 2)
    mean = statistics.fmean(x)
    wide = T * (left / sum((a - mean) ** 2 for a in x)) ** 0.5
    share = (x[-1] - x[0]) / statistics.fmean(y)
    return {
        "slope": slope, "low": slope - wide, "high": slope + wide, "grown low": (slope - wide) * share,
        "grown high": (slope + wide) * share, "first": y[0], "last": y[-1], "most": max(one[1] for one in samples),
    }  # fmt: skip


def verdict(line: dict[str, float]) -> str:
    """Whether memory is flat, grows, or may do either."""
    if line["grown high"] < FLAT:
        return "flat"
    return "it grows" if line["grown low"] > 0 else "not known: measure longer"


def table(cell: dict[str, Any]) -> str:
    """What was measured, as the page has it."""
    line, judged, samples = slope_of(cell["samples"]), cell["judged"], cell["samples"]
    kinds = ", ".join(f"{count:,} {name}" for name, count in cell["kinds"].items())
    changes = ", ".join(f"{count} {name}" for name, count in cell["changes"].items())
    lines = [
        f"{samples[-1][0] / 60:.1f} minutes with {cell['base']}. Requests: {kinds}; {cell['odd count']} had another"
        f" status than they should. Adapters: {changes}; {len(cell['failed'])} changes failed. Of the answers that can"
        f" be judged {judged['right']:,} were right, {judged['wrong']} wrong, {judged['lost']} lost.",
        "",
        "| resident memory of the server, MB | |",
        "|---|---|",
        f"| after the first fifth | {line['first']:,.0f} |",
        f"| at the end | {line['last']:,.0f} |",
        f"| at most | {line['most']:,.0f} |",
        f"| slope an hour, and its 95% interval | {line['slope']:+.1f} ({line['low']:+.1f} to {line['high']:+.1f}) |",
        f"| growth over the time that counts, at most | {100 * line['grown high']:+.1f}% |",
        f"| so it is (flat: below {100 * FLAT:.0f}%) | **{verdict(line)}** |",
        f"| open files, first and last sample | {samples[0][2]}, {samples[-1][2]} |",
        f"| threads | {samples[0][3]}, {samples[-1][3]} |",
    ]
    return "\n".join(lines)


def measure(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    from inlay.serve.http.keys import Keys

    base, dtype = (str(tiny_base(work / "base")), "float32") if a.tiny else (a.base, a.dtype)
    words = planted(base, dtype, work / "adapters", WORDS)
    size = sum(path.stat().st_size for path in (work / "adapters").rglob("*.safetensors"))
    made = Keys(work / "keys.sqlite", make=True)
    keys = {name: made.add(name, None, None, name == "admin") for name in ("admin", "clients")}
    memory = f"{max(1, size // 2048)}KB"
    with running(work, base, dtype, collects=True, store=STORE, **{"adapter-memory": memory}) as server:
        found = asyncio.run(soaked(a, server, keys, words, 300 if a.tiny else 40_000))
    return found | {"base": "a tiny random base" if a.tiny else f"{a.base} in {dtype}"}


def main() -> None:
    a = arguments()
    if a.hours:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "adapters").mkdir()
            found = measure(a, Path(work))
        a.cells.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    else:
        found = json.loads(a.cells.read_text(encoding="utf8"))
    print(table(found))
    if a.page:
        write_between(a.page, (BEGIN, END), table(found))


if __name__ == "__main__":
    main()
