"""The pictures of a race: score against trained parameters and against latency, and the curves of all contenders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .charts import Line, lines, thinned, tick_names, ticks
from .race_entrants import Entrant, Race
from .words import interval_text, is_number, number, score_text

__all__ = ["LATENCY", "PARAMETERS", "Axis", "curves", "front", "scatter"]

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 14, 40
COLOURS = ("--blue", "--orange", "--green", "--red", "--violet", "--teal")
MOST = 60
"""Points of a curve: steps of a batch leap, and many contenders share the picture."""
APART = 20
"""Largest score over the least from which on the scale is logarithmic."""
SIDE = 5
"""Pixels between points of equal costs, which would hide one another."""
PLACES = ((10, 4), (-10, 4), (0, -8), (0, 17), (15, -10), (-15, -10), (15, 20), (-15, 20), (24, 4), (-24, 4),
          (0, -22), (0, 31), (26, -16), (-26, -16), (26, 26), (-26, 26))  # fmt: skip
"""Where a label may stand beside its point, the best first."""


_Box = tuple[float, float, float, float]
"""Left, top, right and foot."""


@dataclass(frozen=True)
class Axis:
    """A cost that scores are drawn against: `of` a contender, None where it is unknown. `log`: by powers of ten."""

    name: str
    of: Callable[[Entrant], float | None]
    words: Callable[[Entrant], str]
    log: bool = False


PARAMETERS = Axis(
    "trained parameters", lambda own: own.parameters or None, lambda own: f"{number(own.parameters)} parameters", True
)
LATENCY = Axis(
    "ms a token more than the base", lambda own: own.token_ms, lambda own: f"{own.token_ms or 0:+.2g} ms a token"
)


@dataclass(frozen=True)
class _Dot:
    own: Entrant
    x: float
    y: float
    low: float | None
    high: float | None


def front(race: Race, axis: Axis = PARAMETERS) -> list[Entrant]:
    """The Pareto front: contenders that no other one beats in score at as little of the axis; the cheapest first."""
    sign = -1 if race.higher else 1
    found: list[Entrant] = []
    for own in sorted(_there(race, axis), key=lambda own: (axis.of(own) or 0.0, sign * (own.score or 0.0))):
        if not found or sign * (own.score or 0.0) < sign * (found[-1].score or 0.0):
            found.append(own)
    return found


def _there(race: Race, axis: Axis) -> list[Entrant]:
    return [own for own in race.entrants if own.score is not None and axis.of(own) is not None]


def scatter(race: Race, axis: Axis = PARAMETERS) -> str:
    """Score (y) against the axis (x) with intervals; "" where no contender has both."""
    there = _there(race, axis)
    if not there:
        return ""
    values = [own.score or 0.0 for own in there] + ([race.base] if race.base is not None else [])
    log = min(values) > 0 and max(values) > APART * min(values)
    ends = values + [end for own in there for end in _ends(own) if not log or end > 0]
    y = _Scale(ends, TOP, HEIGHT - BOTTOM, log)
    costs = [axis.of(own) or 0.0 for own in there] + ([] if axis.log else [0.0])
    x = _Scale(costs, WIDTH - RIGHT - 12, LEFT + 12, axis.log)
    dots = _dots(there, axis, x, y)
    parts = _axes(race, axis, x, y)
    best = {own.name for own in front(race, axis)}
    path = [f"{dot.x:.1f},{dot.y:.1f}" for dot in sorted(dots, key=lambda dot: dot.x) if dot.own.name in best]
    parts += [f'<polyline class="front" points="{" ".join(path)}"/>'] if len(path) > 1 else []
    parts += [_bar(dot) for dot in dots] + [_circle(race, axis, dot, best) for dot in dots]
    taken = [_around(dot) for dot in dots]
    if race.base is not None:
        parts.append(_base_label(y.at(race.base), taken))
    parts += _labels(dots, taken)
    title = f"{escape(race.metric)} against {axis.name}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>' + (
        "".join(parts) + "</svg>"
    )


def curves(race: Race) -> list[tuple[str, str]]:
    """Titles and SVGs of the training loss and the choosing score by tokens; those that left end where they left."""
    training = [thinned(_points(own, ("loss",)), MOST) for own in race.entrants]
    held = [_points(own, ("heldout", race.metric)) for own in race.entrants]
    rows = "" if race.choosing_rows is None else f" on {number(race.choosing_rows)} choosing rows"
    made = [
        ("Training loss", lines("training loss by tokens", _lines(race, training, False), "tokens")),
        (f"{race.metric.replace('_', ' ').capitalize()}{rows}",
         lines(f"{race.metric} by tokens", _lines(race, held, True), "tokens")),
    ]  # fmt: skip
    return [(title, svg) for title, svg in made if svg]


def _lines(race: Race, found: Sequence[Sequence[tuple[float, float]]], dots: bool) -> list[Line]:
    """The first ones in colours, the others behind them and told apart by the tables alone."""
    made: list[Line] = []
    several = [(own, points) for own, points in zip(race.entrants, found, strict=True) if points]
    for n, (own, points) in enumerate(several):
        if n < len(COLOURS):
            made.append(Line(own.name, points, COLOURS[n], dots))
        else:
            left = len(several) - n
            name = f"{left} other{'s' if left > 1 else ''}" if n == len(COLOURS) else ""
            made.append(Line(name, points, "--grey", faint=True))
    return made


def _points(own: Entrant, path: Sequence[str]) -> list[tuple[float, float]]:
    found = []
    for line in own.metrics:
        value = line
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if is_number(value) and is_number(line.get("tokens")):
            found.append((line["tokens"], value))
    return found


# ---- the plot of scores


class _Scale:
    """From values to pixels; `first` is where the largest one stands."""

    def __init__(self, values: Sequence[float], first: float, last: float, log: bool) -> None:
        self.log, self.first, self.last = log, first, last
        low, high = min(map(self._of, values)), max(map(self._of, values))
        room = (high - low) * 0.06 or 0.5 * (1 if log else abs(high) or 1)
        self.low, self.high = low - room, high + room

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        """Within the picture, whatever the value."""
        share = 0.0 if self.log and value <= 0 else (self._of(value) - self.low) / (self.high - self.low)
        return self.last + min(max(share, 0.0), 1.0) * (self.first - self.last)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, 5)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [k * 10.0**n for n in powers for k in steps if self.low <= math.log10(k * 10.0**n) <= self.high]
            if len(found) >= 3:
                break
        return found


def _ends(own: Entrant) -> list[float]:
    given = own.interval
    there = isinstance(given, (list, tuple)) and len(given) == 2 and all(map(is_number, given))
    return [float(end) for end in given] if there else []


def _dots(there: Sequence[Entrant], axis: Axis, x: _Scale, y: _Scale) -> list[_Dot]:
    """Their places; those of equal costs stand side by side."""
    columns: dict[int, list[Entrant]] = {}
    for own in there:
        columns.setdefault(round(x.at(axis.of(own) or 0.0) / SIDE), []).append(own)
    found = []
    for members in columns.values():
        side = min(SIDE, 40 / len(members))
        for n, own in enumerate(sorted(members, key=lambda own: own.score or 0.0)):
            across = x.at(axis.of(own) or 0.0) + (n - (len(members) - 1) / 2) * side
            ends = [y.at(end) for end in _ends(own)]
            low, high = (ends[0], ends[1]) if ends else (None, None)
            found.append(_Dot(own, across, y.at(own.score or 0.0), low, high))
    return sorted(found, key=lambda dot: dot.own.place)


def _axes(race: Race, axis: Axis, x: _Scale, y: _Scale) -> list[str]:
    parts, up = [], y.ticks()
    for value, name in zip(up, tick_names(up), strict=True):
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{name}</text>')
    for value in x.ticks():
        parts.append(
            f'<text x="{x.at(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_amount(value)}</text>'
        )
    low = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{low}" y2="{low}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{axis.name}</text>')
    if race.base is not None:
        at = y.at(race.base)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    return parts


def _amount(value: float) -> str:
    for size, mark in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{mark}"
    return f"{value:g}"


def _bar(dot: _Dot) -> str:
    if dot.low is None or dot.high is None:
        return ""
    return f'<line class="interval" x1="{dot.x:.1f}" x2="{dot.x:.1f}" y1="{dot.low:.1f}" y2="{dot.high:.1f}"/>'


def _circle(race: Race, axis: Axis, dot: _Dot, best: set[str]) -> str:
    kind = "won" if race.winner is not None and dot.own.name == race.winner.name else "dot"
    kind += " fronted" if dot.own.name in best else ""
    within = interval_text(dot.own.interval)
    said = f"{dot.own.name}: {race.metric} {score_text(dot.own.score)}{f' ({within})' if within else ''}"
    said += f", {axis.words(dot.own)}"
    return f'<circle class="{kind}" cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="4"><title>{escape(said)}</title></circle>'


def _around(dot: _Dot) -> _Box:
    return dot.x - 5, dot.y - 5, dot.x + 5, dot.y + 5


def _base_label(at: float, taken: list[_Box]) -> str:
    """The word at the base's line, at the end of it that hides the least; its box is added to `taken`."""
    boxes = [(left, top, left + 28.0, top + 12.0) for left in (LEFT + 3.0, WIDTH - RIGHT - 28.0, WIDTH / 2) for top in
             (at - 15, at + 3)]  # fmt: skip
    own = min(boxes, key=lambda box: _covered(box, taken))
    taken.append(own)
    return f'<text x="{own[0]:.1f}" y="{own[1] + 11:.1f}">base</text>'


def _labels(dots: Sequence[_Dot], taken: list[_Box]) -> list[str]:
    """The contenders' places as labels, each where it covers the least of what is `taken`; far ones have a leader."""
    parts = []
    for n, dot in enumerate(dots):
        text = str(dot.own.place)
        half = 4 * len(text)
        others = taken[:n] + taken[n + 1 :]

        def box(shift: tuple[int, int], dot: _Dot = dot, half: int = half) -> _Box:
            middle = dot.x + shift[0] + (half - 4 if shift[0] > 0 else 4 - half if shift[0] < 0 else 0)
            return middle - half, dot.y + shift[1] - 11, middle + half, dot.y + shift[1] + 1

        shift = min(PLACES, key=lambda shift: (_covered(box(shift), others), PLACES.index(shift)))
        own = box(shift)
        taken.append(own)
        middle, foot = (own[0] + own[2]) / 2, own[3] - 1
        if abs(shift[0]) > 10 or abs(shift[1]) > 20:
            parts.append(
                f'<line class="leader" x1="{dot.x:.1f}" y1="{dot.y:.1f}" x2="{middle:.1f}" y2="{foot - 4:.1f}"/>'
            )
        parts.append(f'<text class="place" x="{middle:.1f}" y="{foot:.1f}" text-anchor="middle">{text}</text>')
    return parts


def _covered(own: _Box, others: Sequence[_Box]) -> float:
    """The area of others that a box covers; a box outside the picture covers most."""
    left, top, right, foot = own
    if left < LEFT or right > WIDTH or top < 0 or foot > HEIGHT - BOTTOM:
        return 1e6
    return sum(
        max(0.0, min(right, b[2]) - max(left, b[0])) * max(0.0, min(foot, b[3]) - max(top, b[1])) for b in others
    )
