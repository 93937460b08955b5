"""A server's speed through HTTP, its answers while adapters come and go, and what one tenant does to another.

The server is a process of its own, and so are the clients. (1) 32 clients with a LoRA each beside the decode loop alone
with the same adapters, prompts and lengths, in turns. (2) 64 clients ask without pause while adapters are loaded,
replaced and dropped; each adapter says a word of its own whatever it reads, so that every answer can be judged.
(3) One tenant's times while another asks at its rate, and at ten times that, with and without a rate on its key.

    python benchmarks/serve_speed.py --page docs/performance.md     about a quarter of an hour of two cores
    python benchmarks/serve_speed.py --tiny --minutes 0.2 --seconds 4 --rounds 2
    python benchmarks/serve_speed.py --parts 3                      one part; the others stay as they were
needs: pip install -e '.[serve]' httpx
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import write_between
from serve_clients import Answer, Claims, ask, client_of, shares
from serve_parts import Planted, Running, console, drawn_loras, planted, running, tiny_base
from serve_traffic import Changes, Judge, planted_ask, traffic

CLIENTS, PROMPT = 32, 32
SHORT = 16
"""Tokens of an answer to the tenants of the third part."""
SHARE = 0.08
"""What one tenant's rate is of what the server can do."""
MANY, WORDS = 64, 32
"""Clients of the second part, and words that its adapters say."""
BEGIN, END = "<!-- serve: begin -->", "<!-- serve: end -->"
Cell = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="a name or a folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny random base, for a quick try")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", default="1,2,3")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer in the first part")
    parser.add_argument("--rounds", type=int, default=4, help="of the first part and of the third; one more to warm up")
    parser.add_argument("--minutes", type=float, default=10, help="of the second part")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one change of adapters to the next")
    parser.add_argument("--seconds", type=float, default=30, help="of each window of the third part")
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_name("serve_speed.json"))
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    return parser.parse_args()


# ---- 1: through HTTP, and alone


class Alone:
    """The decode loop in this process, with the adapters that the server has too."""

    def __init__(self, base: str, dtype: str, folder: Path) -> None:
        import inlay
        from inlay.bases.load import load_base
        from inlay.runtime.decode import Decoder

        self.bank = inlay.attach(load_base(base, dtype).model)
        self.names = drawn_loras(self.bank, CLIENTS)
        self.vocabulary = self.bank.model.get_input_embeddings().num_embeddings  # pyright: ignore
        for name in self.names:
            self.bank.save(name, folder / name)
        self.decoder = Decoder(self.bank, 2**30)

    def seconds(self, prompts: Sequence[list[int]], new: int) -> float:
        """Of all answers, from the first prompt that is read to the last token."""
        decoder, begun = self.decoder, time.perf_counter()
        for name, ids in zip(self.names, prompts, strict=True):
            decoder.add(name, ids, new)
        left = CLIENTS
        while left:
            rows, logits = decoder.step()
            chosen = [] if logits is None else logits.argmax(-1).tolist()
            for row, token in zip(rows, chosen, strict=True):
                decoder.write(row, token)
                if len(row.written) == new:
                    decoder.end(row)
                    left -= 1
        return time.perf_counter() - begun


async def together(
    server: Running, key: str, names: Sequence[str], prompts: Any, new: int, stream: bool
) -> float:  # fmt: skip
    """Seconds until every client has its whole answer."""
    async with client_of(server, key) as http:
        await asyncio.gather(*(http.get("/healthz") for _ in names))  # connections are there before the clock runs
        begun = time.perf_counter()
        answers = await asyncio.gather(*(ask(http, n, p, new, stream) for n, p in zip(names, prompts, strict=True)))
        seconds = time.perf_counter() - begun
    wrong = [answer for answer in answers if not answer.complete(new)]
    if wrong:
        raise SystemExit(f"{len(wrong)} answers are not whole; the first: {wrong[0]}")
    return seconds


def throughput(a: argparse.Namespace, server: Running, key: str, alone: Alone) -> Cell:
    """Tokens a second of each side, the median of all rounds, whose first does not count."""
    own = random.Random(3)
    seconds: dict[str, list[float]] = {}
    for round_ in range(a.rounds + 1):
        prompts = [[own.randrange(3, alone.vocabulary) for _ in range(PROMPT)] for _ in alone.names]
        other = [[own.randrange(3, alone.vocabulary) for _ in range(PROMPT)] for _ in alone.names]
        sides = {
            "decode loop alone": lambda p=prompts: alone.seconds(p, a.new),
            "HTTP, streams": lambda p=prompts: asyncio.run(together(server, key, alone.names, p, a.new, True)),
            "HTTP, whole answers": lambda p=other: asyncio.run(together(server, key, alone.names, p, a.new, False)),
        }
        order = list(sides) if round_ % 2 else list(reversed(sides))
        for name in order:
            took = sides[name]()
            if round_:
                seconds.setdefault(name, []).append(took)
            console.print(f"round {round_}, {name}: {CLIENTS * a.new / took:.0f} tokens/s")
    speeds = {name: CLIENTS * a.new / statistics.median(took) for name, took in seconds.items()}
    pairs = zip(seconds["decode loop alone"], seconds["HTTP, streams"], strict=True)
    return {"new": a.new, "tokens/s": speeds, "ratio": statistics.median(loop / http for loop, http in pairs)}


# ---- 2: adapters that come and go


async def changing(a: argparse.Namespace, server: Running, keys: Mapping[str, str], words: Planted, size: int) -> Cell:
    """Counts of answers and changes, and times in milliseconds."""
    claims = Claims()
    async with client_of(server, keys["admin"]) as admin, client_of(server, keys["clients"]) as http:
        changes, judge = Changes(server, admin, words, claims), Judge(claims, words)
        await changes.set_up()
        begun = time.perf_counter()
        until = begun + 60 * a.minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(changes.run(until, a.every))
            group.create_task(traffic(MANY, until, lambda own: planted_ask(http, judge, own, size)))
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, **judge.said(), "changes": dict(changes.counts), "failed": changes.failed}


# ---- 3: a tenant that asks for more


async def asked(http: Any, model: str, rate: float, until: float, size: int, own: random.Random) -> list[Answer]:
    """Requests that come by chance, `rate` a second, whether those before have been answered or not."""
    tasks, next_ = [], time.perf_counter() + own.expovariate(rate)
    while next_ < until:
        await asyncio.sleep(max(0.0, next_ - time.perf_counter()))
        prompt = [own.randrange(3, size) for _ in range(PROMPT)]
        tasks.append(asyncio.ensure_future(ask(http, model, prompt, SHORT)))
        next_ += own.expovariate(rate)
    return list(await asyncio.gather(*tasks))


async def window(
    server: Running, seconds: float, tenants: Sequence[tuple[str, str, float]], size: int, seed: int
) -> list[list[Answer]]:  # fmt: skip
    """The answers of each tenant, given by its key, its model and its rate."""
    clients = [client_of(server, key) for key, _, _ in tenants]
    until = time.perf_counter() + seconds
    asks = [
        asked(http, model, rate, until, size, random.Random(f"{seed} {number}"))
        for number, (http, (_, model, rate)) in enumerate(zip(clients, tenants, strict=True))
    ]
    try:
        return list(await asyncio.gather(*asks))
    finally:
        for http in clients:
            await http.aclose()


def neighbours(a: argparse.Namespace, server: Running, keys: Mapping[str, str], rate: int, size: int) -> Cell:
    """p50, p95 and p99 of a tenant's times, in milliseconds, beside what another does."""
    one = (keys["steady"], "lora-0", rate)
    cases = {
        "nobody else": [one],
        "another at its rate": [one, (keys["limited"], "lora-1", rate)],
        "at 10 times its rate, which its key has": [one, (keys["limited"], "lora-1", 10 * rate)],
        "at 10 times its rate, no rate on its key": [one, (keys["free"], "lora-1", 10 * rate)],
    }
    found: dict[str, list[list[Answer]]] = {name: [] for name in cases}
    for round_ in range(max(1, a.rounds // 2)):
        for name, tenants in cases.items():
            answers = asyncio.run(window(server, a.seconds, tenants, size, round_))
            found[name].append(answers[0])
            refused = sum(answer.status == 429 for own in answers[1:] for answer in own)
            console.print(f"{name}: {len(answers[0])} answers, {refused} of the other refused")
    cells = {}
    for name, rounds in found.items():
        whole = [answer for own in rounds for answer in own if answer.complete(SHORT)]
        cells[name] = {
            "answers": len(whole), "lost": sum(map(len, rounds)) - len(whole),
            "first": shares([answer.first for answer in whole]),
            "whole": shares([answer.ended - answer.sent for answer in whole]),
        }  # fmt: skip
    return {"rate": rate, "seconds": a.seconds * max(1, a.rounds // 2), "cases": cells}


# ---- the page


def table(found: Cell) -> str:
    """All parts that were measured, as a page has them."""
    return "\n\n".join(part(found[name]) for name, part in PARTS.items() if name in found)


def _throughput(cell: Cell) -> str:
    lines = [
        f"| {CLIENTS} LoRAs, {CLIENTS} prompts of {PROMPT} tokens, {cell['new']} written | tokens/s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {speed:.0f} |" for name, speed in cell["tokens/s"].items()]
    return "\n".join([*lines, "", f"Streams through HTTP are {cell['ratio']:.2f} of the decode loop alone."])


def _changing(cell: Cell) -> str:
    changes = ", ".join(f"{count} {name}" for name, count in cell["changes"].items())
    said = (
        f"{MANY} clients for {cell['seconds'] / 60:.1f} minutes, meanwhile adapters were {changes}"
        f" ({len(cell['failed'])} changes failed): {cell['right']:,} answers right, **{cell['wrong']} wrong,"
        f" {cell['lost']} lost**; {cell['unknown']} asked for a name that had been dropped, and were told so."
    )
    lines = [said, "", f"| {cell['tokens'] / cell['seconds']:.0f} tokens/s | p50 | p95 | p99 |", "|---|---|---|---|"]
    for name, key in (("ms to the first token", "first"), ("ms between tokens", "between")):
        lines.append(f"| {name} | " + " | ".join(f"{value:.0f}" for value in cell[key].values()) + " |")
    return "\n".join(lines)


def _neighbours(cell: Cell) -> str:
    rate, base = cell["rate"], cell["cases"]["another at its rate"]
    lines = [
        f"| one tenant, {rate} requests a second; beside it | answers | first token p95, ms | whole answer p95, ms |"
        " of the second line |",
        "|---|---|---|---|---|",
    ]
    for name, own in cell["cases"].items():
        share = " and ".join(f"{own[key]['p95'] / base[key]['p95']:.2f}" for key in ("first", "whole"))
        lost = f" ({own['lost']} lost)" if own["lost"] else ""
        lines.append(
            f"| {name} | {own['answers']}{lost} | {own['first']['p95']:.0f} | {own['whole']['p95']:.0f} | {share} |"
        )
    return "\n".join(lines)


PARTS = {"throughput": _throughput, "changing": _changing, "neighbours": _neighbours}


def measure(a: argparse.Namespace, work: Path, found: Cell) -> None:
    """Run the parts that are asked for; `found` gets their figures, and the file of cells."""
    from inlay.serve.http.keys import Keys
    from inlay.serve.http.limits import Rate

    base, dtype = (str(tiny_base(work / "base")), "float32") if a.tiny else (a.base, a.dtype)
    parts = a.parts.split(",")
    alone = Alone(base, dtype, work / "adapters")
    words = planted(base, dtype, work / "adapters", WORDS) if "2" in parts else None
    made = Keys(work / "keys.sqlite", make=True)
    keys = {name: made.add(name, None, None, name == "admin") for name in ("admin", "clients", "steady", "free")}
    with running(work, base, dtype) as server:
        speed = found.get("throughput")
        if "1" in parts or ("3" in parts and speed is None):
            speed = found["throughput"] = throughput(a, server, keys["clients"], alone)
            _keep(a, found)
        if words is not None:
            found["changing"] = asyncio.run(changing(a, server, keys, words, alone.vocabulary))
            _keep(a, found)
        if "3" in parts and speed is not None:
            rate = max(1, round(SHARE * speed["tokens/s"]["HTTP, streams"] / SHORT))
            keys["limited"] = made.add("limited", None, Rate.read(f"{rate}/s"), False)
            found["neighbours"] = neighbours(a, server, keys, rate, alone.vocabulary)
            _keep(a, found)


def _keep(a: argparse.Namespace, found: Cell) -> None:
    a.cells.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


def main() -> None:
    a = arguments()
    found = json.loads(a.cells.read_text(encoding="utf8")) if a.cells.exists() else {}
    if a.parts:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "adapters").mkdir()
            measure(a, Path(work), found)
    print(table(found))
    if a.page:
        write_between(a.page, (BEGIN, END), table(found))


if __name__ == "__main__":
    main()
