"""What virtual tokens and prefixes say in words, and what to try: rules over numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .finding import NONE, Change, Cost, Finding, Settings, cost_of, within
from .words_near import CHANCE

__all__ = ["about_attention", "about_tokens"]

STILL = 0.01
"""What virtual tokens that hardly moved have moved by at most, by their norm at the start."""
ALIKE = 0.9


def about_tokens(
    look: Mapping[str, Any], removed: Iterable[Change], orders: Sequence[Change], gain: float,
    settings: Settings = NONE,
) -> list[Finding]:  # fmt: skip
    """What virtual tokens or a prefix mean, and how many are needed."""
    count, found = look["count"], [_meaning(look)]
    alike = look["similarity"]
    if alike is not None and alike > ALIKE:
        told = f"They are alike (mean cosine {alike:.2f}) and span {look['effective_number']:.1f} directions."
        found.append(Finding("similarity", told, _fewer(max(1, count // 2), settings)))
    moved = [token["moved"] for token in look["tokens"] if token["moved"] is not None]
    if moved:
        middle = sorted(moved)[len(moved) // 2]
        words = f"They moved by {middle:.1%} of their norm at the start, on the median"
        still = middle < STILL
        found.append(Finding("moved", f"{words}{': hardly' if still else ''}.", "A higher rate." if still else ""))
    costs: list[Cost] = [cost_of(change, gain) for change in removed]
    if costs and not gain > 0:
        found.append(Finding("length", "There is no sure gain that fewer of them could keep or lose.", noise=True))
    elif costs:
        found.append(_needed(costs, count, settings))
    return found + _order(orders, gain, look["kind"])


def _meaning(look: Mapping[str, Any]) -> Finding:
    tokens, thing = look["tokens"], "keys of the prefix" if look["kind"] == "prefix" else "virtual tokens"
    if look["no_words"]:
        return Finding("words", f"Which words they are near cannot be said: {look['no_words']}.")
    near = [token for token in tokens if token["chance"] <= CHANCE]
    if not near:
        told = f"None of {len(tokens)} {thing} is nearer to a word than vectors that are no words: read nothing into"
        return Finding("words", f"{told} their nearest words.", noise=True)
    best = max(near, key=lambda token: token["z"])
    word = best["nearest"][0]
    told = f"{len(near)} of {len(tokens)} {thing} are nearer to a word than chance, number {best['index']} most:"
    told += f" {word['word']!r} (cosine {word['cosine']:.2f}, z {best['z']:.1f})"
    began, chance = sum(token.get("began") == token["nearest"][0]["id"] for token in near), CHANCE * len(tokens)
    told += f"; by chance about {chance:.1f} would be" if len(near) < len(tokens) else ""
    if not began:
        return Finding("words", f"{told}.", noise=len(near) <= chance + 2 * math.sqrt(chance))
    told += f". {began} of them began as that word: training has not chosen it"
    return Finding("words", f"{told}.", noise=began == len(near))


def _fewer(count: int, settings: Settings) -> str:
    return f"--set num_virtual_tokens={count}" if "num_virtual_tokens" in settings else ""


def _needed(costs: Sequence[Cost], count: int, settings: Settings) -> Finding:
    needed, free = costs.count("costs"), costs.count("free")
    told = f"Left out alone, {needed} of {count} cost loss, {free} are free, and {len(costs) - needed - free} cannot be"
    told += " told."
    if free * 2 >= count:
        return Finding("length", told, _fewer(max(1, count - free // 2), settings))
    unclear = len(costs) - needed - free
    return Finding("length", told, "Look at more rows (--limit)." if unclear * 2 > count else "", unclear * 2 > count)


def _order(orders: Sequence[Change], gain: float, kind: str) -> list[Finding]:
    if not orders:
        return []
    worst = max(orders, key=lambda change: change["difference"])
    if all(abs(change["difference"]) < 1e-4 for change in orders):
        why = ": a prefix is a set of keys, and has no order" if kind == "prefix" else ""
        return [Finding("order", f"In another order they do the same{why}.")]
    told = {"costs": "Their order matters", "free": "Their order hardly matters"}.get(cost_of(worst, gain))
    if told is None and kind == "prefix":
        words = (
            f"A prefix is a set of keys: what another order changes ({within(worst)}), rows do not tell from rounding."
        )
        return [Finding("order", words)]
    if told is None:
        return [Finding("order", f"Whether their order matters, the rows do not tell ({within(worst)}).", noise=True)]
    return [Finding("order", f"{told}: shuffled, the loss differs by {within(worst)}.")]


def about_attention(told: Mapping[str, Any]) -> Finding:
    """Whether virtual tokens are looked at: what all of them get beside what as many keys would get if all got the
    same. Attention is no effect (Jain and Wallace 2019, arXiv:1902.10186): that is the loss without them. One that gets
    more than half of what all get stands where a text's first token does, which takes the attention that nothing else
    is to get (Xiao et al. 2023, arXiv:2309.17453)."""
    count, share = len(told["tokens"]), told["all"]
    even = min(1.0, told["even"] * count)
    words = f"{share:.0%} of the attention behind them goes to them; evenly spread, it would be {even:.0%}"
    first = max(range(count), key=lambda n: told["tokens"][n]["share"])
    alone = told["tokens"][first]["share"]
    if count > 2 and alone > share / 2 and alone > 2 * told["even"]:
        words += f"; number {first} alone gets {alone:.0%}, as the first token of a text does"
    if share < even / 4:
        return Finding("attention", f"{words}: they are hardly looked at.", "A higher rate, or another start (init).")
    if share > max(0.8, 1.5 * even):
        then = "A lower rate, or a start from words (init=vocab)."
        return Finding("attention", f"{words}: a row hardly sees its own tokens.", then)
    return Finding("attention", f"{words}.")
