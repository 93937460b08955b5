"""Small line and bar charts as inline SVG, coloured by the page's own variables.

They are drawn for a card on a telephone; the page's style makes their words smaller where the card is wider.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

__all__ = ["Line", "bars", "lines", "thinned", "tick_names", "ticks"]

WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 38
POINTS = 500
"""At most, in one line; more cannot be seen."""
APART = 100
"""Largest value over the middle one from which on the scale is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named curve; `colour` names a CSS variable, `dots` marks its points, `faint` draws it behind the others. One
    without a name stays out of the legend."""

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class _Frame:
    """From numbers to places in the picture."""

    x: Point
    y: Point
    log: bool = False
    parts: list[str] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        (x0, x1), (y0, y1) = self.x, self.y
        height = math.log10(point[1]) if self.log else point[1]
        across = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y1 - height) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)


def lines(
    title: str,
    curves: Sequence[Line],
    unit: str = "step",
    mark: tuple[float, str] | None = None,
    ends: Sequence[float] = (),
) -> str:
    """An SVG of curves over a shared x axis of whole numbers, which holds `ends` too.

    `mark` draws a named upright line. "" where there is nothing to draw. Values that are far apart get a logarithmic
    scale, which the legend says.
    """
    curves = [replace(curve, points=_finite(curve.points)) for curve in curves]
    curves = [curve for curve in curves if curve.points]
    across = [*ends, *(x for curve in curves for x, _ in curve.points)]
    up = [y for curve in curves for _, y in curve.points]
    if not up:
        return ""
    log = min(up) > 0 and max(up) > APART * statistics.median(up)
    frame = _Frame(_span(across, 0), _span([math.log10(y) for y in up] if log else up, 0.06, log), log)
    parts = _axes(frame, unit, (min(across), max(across)))
    if mark is not None and frame.x[0] <= mark[0] <= frame.x[1]:
        x = frame.at((mark[0], up[0]))[0]
        side = "end" if x > WIDTH * 0.6 else "start"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        shift = -5 if side == "end" else 5
        parts.append(f'<text x="{x + shift}" y="{TOP + 11}" text-anchor="{side}">{escape(mark[1])}</text>')
    parts += [part for curve in sorted(curves, key=lambda c: not c.faint) for part in _curve(frame, curve)]
    return _svg(title, parts) + _legend(curves, log)


def bars(title: str, edges: Sequence[float], counts: Sequence[float], unit: str) -> str:
    """An SVG histogram: `counts[i]` between `edges[i]` and `edges[i + 1]`."""
    if not counts or not max(counts):
        return ""
    frame = _Frame((edges[0], edges[len(counts)]), (0.0, max(counts) * 1.06))
    parts = _axes(frame, unit, frame.x, whole=True)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        (x0, y0), (x1, y1) = frame.at((low, count)), frame.at((high, 0))
        parts.append(
            f'<rect class="bar" x="{x0 + 1}" y="{y0}" width="{max(x1 - x0 - 2, 0.5):.1f}" height="{y1 - y0:.1f}">'
            f"<title>{_short(low)} to {_short(high)}: {_short(count)}</title></rect>"
        )
    return _svg(title, parts)


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points, each the mean of those it stands for; the last one stays."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _finite(points: Sequence[Point]) -> list[Point]:
    return thinned([(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)])


def _span(values: Sequence[float], margin: float, free: bool = False) -> Point:
    """The ends of an axis; `free` lets it pass below zero where no value does."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - 1, high + 1) if not margin else (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)
    room = (high - low) * margin
    return (low - room if free or low < 0 or low - room > 0 else 0.0 if margin else low), high + room


def _curve(frame: _Frame, curve: Line) -> list[str]:
    places = [frame.at(point) for point in curve.points]
    kind = "curve faint" if curve.faint else "curve dashed" if curve.dashed else "curve"
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline class="{kind}" style="stroke:var({curve.colour})" points="{path}"/>']
    if curve.dots or len(places) == 1:
        for (x, y), (step, value) in zip(places, curve.points, strict=True):
            words = f"{escape(curve.name)}: {_short(value)} at {_short(step)}"
            parts.append(
                f'<circle style="fill:var({curve.colour})" cx="{x}" cy="{y}" r="3"><title>{words}</title></circle>'
            )
    return parts


def _axes(frame: _Frame, unit: str, shown: Point, whole: bool = False) -> list[str]:
    """Lines and words of both axes; x has ticks within `shown`, y whole ones too where it counts."""
    parts = []
    up = [10.0**n for n in ticks(*frame.y, 5, True)] if frame.log else ticks(*frame.y, 5, whole)
    for value, name in zip(up, tick_names(up), strict=True):
        _, y = frame.at((frame.x[0], value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{name}</text>')
    for value in ticks(*frame.x, 5, True):
        if shown[0] <= value <= shown[1]:
            x = frame.at((value, up[0] if up else 1.0))[0]
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(unit)}</text>')
    return parts


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers between low and high, integers where they are to be `whole`."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_names(values: Sequence[float]) -> list[str]:
    """Words for an axis' ticks, all of one form."""
    largest = max(map(abs, values), default=0)
    if 1e-2 <= largest < 1e7 or not largest:
        return [_short(value) for value in values]
    return [_power(value) if value else "0" for value in values]


def _power(value: float) -> str:
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _short(value: float) -> str:
    if abs(value) >= 1e7 or (value and abs(value) < 1e-3):
        return _power(value)
    return f"{value / 1000:,.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _svg(title: str, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _legend(curves: Sequence[Line], log: bool) -> str:
    named = "".join(
        f'<span><i style="background:var({curve.colour});opacity:{0.4 if curve.faint else 1}"></i>'
        f"{escape(curve.name)}</span>"
        for curve in curves
        if curve.name
    )
    return f'<div class="legend">{named}{"<span>logarithmic scale</span>" if log else ""}</div>'
