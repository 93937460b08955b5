"""Small line and bar charts as inline SVG, coloured by the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Line", "bars", "lines", "thinned"]

WIDTH, HEIGHT = 500, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
POINTS = 500
"""At most, in one line; more cannot be seen."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named curve; `colour` names a CSS variable, `dots` marks its points, `faint` draws it behind the others."""

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class _Frame:
    """From numbers to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    parts: list[str] = field(default_factory=list)

    def at(self, point: Point) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y1 - point[1]) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)


def lines(title: str, curves: Sequence[Line], unit: str = "step", mark: tuple[float, str] | None = None) -> str:
    """An SVG of curves over a shared x axis; `mark` draws a named upright line. "" where there is nothing to draw."""
    curves = [Line(c.name, _finite(c.points), c.colour, c.dots, c.faint, c.dashed) for c in curves]
    curves = [curve for curve in curves if curve.points]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    frame = _Frame(_span([x for x, _ in points], 0), _span([y for _, y in points], 0.06))
    parts = _axes(frame, unit)
    if mark is not None:
        x, _ = frame.at((mark[0], frame.y[0]))
        side = "end" if x > WIDTH * 0.7 else "start"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        shift = -5 if side == "end" else 5
        parts.append(f'<text x="{x + shift}" y="{TOP + 11}" text-anchor="{side}">{escape(mark[1])}</text>')
    parts += [part for curve in sorted(curves, key=lambda c: not c.faint) for part in _curve(frame, curve)]
    return _svg(title, parts) + _legend(curves)


def bars(title: str, edges: Sequence[float], counts: Sequence[float], unit: str) -> str:
    """An SVG histogram: `counts[i]` between `edges[i]` and `edges[i + 1]`."""
    if not counts or not max(counts):
        return ""
    frame = _Frame((edges[0], edges[len(counts)]), (0.0, max(counts) * 1.06))
    parts = _axes(frame, unit)
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


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    room = (high - low) * margin
    return (low - room if low < 0 or low - room > 0 else 0.0 if margin else low), high + room


def _curve(frame: _Frame, curve: Line) -> list[str]:
    places = [frame.at(point) for point in curve.points]
    kind = "curve faint" if curve.faint else "curve dashed" if curve.dashed else "curve"
    path = " ".join(f"{x},{y}" for x, y in places)
    parts = [f'<polyline class="{kind}" style="stroke:var({curve.colour})" points="{path}"/>']
    if curve.dots or len(places) == 1:
        for (x, y), (step, value) in zip(places, curve.points, strict=True):
            told = f"{escape(curve.name)}: {_short(value)} at {_short(step)}"
            parts.append(
                f'<circle style="fill:var({curve.colour})" cx="{x}" cy="{y}" r="3.5"><title>{told}</title></circle>'
            )
    return parts


def _axes(frame: _Frame, unit: str) -> list[str]:
    parts = []
    for value in _ticks(*frame.y, 5):
        _, y = frame.at((frame.x[0], value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{_short(value)}</text>')
    for value in _ticks(*frame.x, 6):
        x, _ = frame.at((value, frame.y[0]))
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(unit)}</text>')
    return parts


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 or not value else f"{value:.0e}"


def _svg(title: str, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _legend(curves: Sequence[Line]) -> str:
    named = "".join(
        f'<span><i style="background:var({curve.colour});opacity:{0.4 if curve.faint else 1}"></i>'
        f"{escape(curve.name)}</span>"
        for curve in curves
    )
    return f'<div class="legend">{named}</div>'
