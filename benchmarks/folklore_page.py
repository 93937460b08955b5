"""What folklore.py's cells say of each saying: every sentence that depends on numbers is made from them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from folklore_parts import STREAMS, TIMED
from folklore_sayings import SAYINGS, Saying

from inlay.evaluation.intervals import student

__all__ = ["Apart", "crossed", "outcome", "page_text", "rate_share"]

Cell = dict[str, Any]
Cells = Mapping[tuple[str, str, int], Cell]
RESAMPLES = 2000
HOME = {case: stream for stream, cases in STREAMS.items() for case in cases}


@dataclass(frozen=True)
class Apart:
    """A difference in the mean over seeds and rows, its 95 % interval, and how many seeds it is of."""

    mean: float
    low: float
    high: float
    seeds: int

    def says(self, sign: int) -> int:
        """1 where it is of the sign beyond chance, -1 where it is of the other one, 0 where chance may do it."""
        return sign if self.low > 0 else -sign if self.high < 0 else 0


def crossed(apart: np.ndarray) -> Apart:
    """Of paired differences (seeds, rows), the rows the same for each seed: clustered by row and by seed (Cameron,
    Gelbach and Miller 2011), with Satterthwaite's degrees of freedom, which few seeds make few."""
    seeds, rows = apart.shape
    mean = float(apart.mean())
    by_row = float(apart.mean(0).var(ddof=1)) / rows
    if seeds == 1:
        half = student(rows - 1) * math.sqrt(by_row)
        return Apart(mean, mean - half, mean + half, 1)
    by_seed = float(apart.mean(1).var(ddof=1)) / seeds
    rest = apart - apart.mean(0) - apart.mean(1, keepdims=True) + mean
    both = float((rest**2).sum()) / ((seeds - 1) * (rows - 1)) / (seeds * rows)
    whole = max(by_row + by_seed - both, by_row, by_seed)
    if not whole:
        return Apart(mean, mean, mean, seeds)
    freedom = whole**2 / (by_row**2 / (rows - 1) + by_seed**2 / (seeds - 1))
    half = student(max(1, int(freedom))) * math.sqrt(whole)
    return Apart(mean, mean - half, mean + half, seeds)


def compared(cells: Cells, pair: tuple[str, str], key: str) -> Apart | None:
    """The first one less the second on the final rows, by the seeds that both have; None where there is none."""
    both = [(cells.get((HOME[pair[0]], pair[0], seed)), cells.get((HOME[pair[1]], pair[1], seed))) for seed in range(9)]
    found = [np.array(one[key], float) - np.array(other[key], float) for one, other in both
             if one and other and key in one and key in other]  # fmt: skip
    return crossed(np.stack(found)) if found else None


def outcome(says: Sequence[int]) -> str:
    """What so many comparisons make of a saying: 1 is for it, -1 against it, 0 not told apart."""
    held, against, many = says.count(1), says.count(-1), len(says)
    if not many:
        return "not measured yet"
    if not held and not against:
        return "not told apart"
    if held == many or against == many:
        return "held" if held else "the other way round"
    words = [f"held in {held} of {many}"] if held else []
    words += [f"the other way round in {against} of {many}"] if against else []
    return ", ".join([*words, *([f"{many - held - against} not told apart"] if many > held + against else [])])


# ---- tables


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def within(found: Apart, scale: float, digits: int) -> str:
    ends = [signed(scale * end, digits) for end in (found.mean, found.low, found.high)]
    return f"{ends[0]} ({ends[1]} to {ends[2]})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def accuracy(cells: Cells, case: str) -> str:
    own = [cell["hits"] for (_, name, _), cell in cells.items() if name == case and "hits" in cell]
    return f"{100 * statistics.mean(map(statistics.mean, own)):.1f}" if own else "–"


def first(cells: Cells, case: str, key: str) -> str:
    cell = cells.get((HOME[case], case, 0), {})
    return f"{cell[key]:,.3g}" if key == "rate" and key in cell else f"{cell[key]:,}" if key in cell else "–"


def measured(cells: Cells, saying: Saying) -> tuple[list[str], list[int], list[int]]:
    """The lines of a saying, and what each pair says of it by accuracy and by the loss."""
    rows, hits, nats, room = [], list[int](), list[int](), list[float]()
    for pair in saying.pairs:
        points, loss = compared(cells, pair, "hits"), compared(cells, pair, "nats")
        if points is None or loss is None:
            rows.append([f"{pair[0]} against {pair[1]}", *["not measured yet"], *[""] * 5])
            continue
        hits.append(points.says(1))
        nats.append(loss.says(-1))
        room += [100 * points.high] if not hits[-1] else []
        names = [" and ".join(first(cells, case, key) for case in pair) for key in ("rate", "trained")]
        scores = " and ".join(accuracy(cells, case) for case in pair)
        apart = [within(points, 100, 1), within(loss, 1, 3)]
        rows.append([f"{pair[0]} against {pair[1]}", *names, scores, *apart, str(points.seeds)])
    columns = ["", "rates", "trained", "accuracy, %", "points apart (95 %)", "loss apart (95 %)", "seeds"]
    lines = [*table(columns, rows), ""]
    if hits:
        words = f"By accuracy: {outcome(hits)}. By the loss: {outcome(nats)}."
        if room and max(room) > 0:
            words += f" Where accuracy tells nothing apart, there is room for a gain of at most {max(room):.1f} points."
        lines.append(words)
    return lines, hits, nats


def times(cells: Cells) -> list[str]:
    """Training speed and latency of prefixes beside LoRA's."""
    found = {case: cells.get(("time", case, 0), {}) for case in TIMED}
    usual = found["r=8"]
    if not usual:
        return ["Times are not measured yet."]
    rows = [
        [case, f"{own['tokens/s']:,.0f}", f"{own['tokens/s'] / usual['tokens/s']:.2f}", signed(own["ms a token"], 1)]
        for case, own in found.items() if own
    ]  # fmt: skip
    lines = table(["", "tokens/s in training, alone", "beside r=8", "ms a decoded token more"], rows)
    if own := found.get("prefix 20"):
        ratio, more = own["tokens/s"] / usual["tokens/s"], own["ms a token"] - usual["ms a token"]
        faster = f"{ratio:.2f} times as fast as" if ratio > 1 else f"{1 / ratio:.2f} times as slow as"
        slower = "more" if more > 0 else "less"
        base = f"LoRA beside the base, which takes {usual['base ms a token']:.0f}"
        words = f"Prefixes of 20 train {faster} LoRA r=8 (rows' own tokens, the faster of two rounds), and a decoded"
        words += f" token takes {abs(more):.1f} ms {slower} than with {base}. LoRA merges, and then adds nothing;"
        words += " prefixes do not."
        lines += ["", words]
    return lines


# ---- the rate


def rate_share(tried: Sequence[Sequence[float]]) -> Apart:
    """Which share of the variance of losses (methods, rates) lies between the rates of a method, not between methods;
    its interval is bootstrapped over methods, and stands in `low` and `high`."""
    losses = np.array(tried, float)

    def share(own: np.ndarray) -> float:
        inside = float(((own - own.mean(1, keepdims=True)) ** 2).sum())
        whole = float(((own - own.mean()) ** 2).sum())
        return inside / whole if whole else 0.0

    rng = np.random.default_rng(0)
    drawn = [share(losses[rng.integers(len(losses), size=len(losses))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Apart(share(losses), float(low), float(high), 1)


def rates(screens: Sequence[Cell]) -> tuple[list[str], str]:
    """What the grid of methods.py says of rate and method, and the outcome in a word."""
    last = {one["case"]: one for one in screens if one["kind"] == "screen"}
    tried = {case: [*one["tried"].values()] for case, one in last.items() if len(one.get("tried", ())) == 3}
    sound = {case: own for case, own in tried.items() if all(map(math.isfinite, own))}
    if len(sound) < 10:
        return ["Not measured yet."], "not measured yet"
    found, spans = rate_share([*sound.values()]), sorted(max(own) - min(own) for own in sound.values())
    best = sorted(min(own) for own in sound.values())
    low, high = np.quantile(best, (0.1, 0.9))
    word = "held" if found.low > 0.5 else "the other way round" if found.high < 0.5 else "not told apart"
    places = sorted(
        {f"{one['device']} in {one['dtype'].removeprefix('torch.')}" for one in last.values() if "tried" in one}
    )
    return [
        f"{len(sound)} cases of methods.py at three rates each, a third, once and three times the method's own, on 300 "
        f"choosing rows, one seed ({', '.join(places)}).", "",
        f"Of the variance of the loss, {100 * found.mean:.0f} % lies between the three rates of a method (95 % "
        f"interval {100 * found.low:.0f} to {100 * found.high:.0f}, over methods), the rest between methods. At each "
        f"method's best rate, the middle four fifths of methods lie within {high - low:.3f} nats; the three rates of "
        f"one method span {statistics.median(spans):.3f} in the median, and {spans[int(0.9 * len(spans))]:.3f} or more "
        f"in a tenth of the methods. That the rate decides more than the method: {word}.",
    ], word  # fmt: skip


def worth(races: Sequence[Cell]) -> list[str]:
    """The contenders of race_worth.py on film reviews, beside LoRA r=8 at a third of its rate."""
    own = {cell["seed"]: cell["contenders"] for cell in races if cell.get("task") == "reviews" and "contenders" in cell}
    shared = set.intersection(*map(set, own.values())) if own else set[str]()
    usual = "lora-r8-3e-4"
    if usual not in shared or len({len(one[usual]["hits"]) for one in own.values()}) != 1:
        return []

    def hits(name: str) -> np.ndarray:
        return np.array([one[name]["hits"] for one in own.values()], float)

    ranked = sorted(shared, key=lambda name: -hits(name).mean())
    apart = {name: within(crossed(hits(name) - hits(usual)), 100, 1) for name in ranked if name != usual}
    rows = [[name, f"{100 * hits(name).mean():.1f}", apart.get(name, "")] for name in ranked]
    lines = table(["contender of race_worth.py", "accuracy, %", f"points beside {usual} (95 %)"], rows)
    return ["", f"The same rows to the end, {len(own)} seeds, {len(hits(usual)[0])} final rows:", "", *lines]


# ---- the page


def page_text(cells: Cells, screens: Sequence[Cell], races: Sequence[Cell]) -> str:
    """The part of docs/folklore.md that depends on numbers."""
    lines, short, many = list[str](), list[list[str]](), 0
    extra: Mapping[str, Callable[[], list[str]]] = {"prefix": lambda: times(cells)}
    for saying in SAYINGS:
        if saying.pairs:
            found, hits, nats = measured(cells, saying)
            many += 2 * len(hits)
            short.append([saying.title, outcome(hits), outcome(nats)])
            found += ["", *extra[saying.key]()] if saying.key in extra else []
        else:
            found, word = rates(screens)
            found += worth(races)
            short.append([saying.title, "", word])
        lines += [f"## {saying.title}", "", saying.said, "", *found, "", *saying.yourself(), ""]
    places = sorted({f"{one['device']} in {one['dtype'].removeprefix('torch.')}" for one in cells.values()})
    where = f"Cells of this page are of {', '.join(places)}." if places else "No cell of this page is measured yet."
    chance = f" Of the {many} differences below, about {max(1, round(many / 20))} would leave zero out by chance alone."
    head = [where + (chance if many else ""), "", *table(["saying", "by accuracy", "by the loss"], short), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*head, *lines])).rstrip()
