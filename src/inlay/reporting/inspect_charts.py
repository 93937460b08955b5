"""Pictures of what an adapter has learned: changes of the loss with their intervals, and norms by layer and module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from .charts import tick_names, ticks
from .words import is_number, number

__all__ = ["Heat", "changes", "heat"]

WIDTH, LEFT, RIGHT, LINE, FOOT = 520, 76, 14, 19, 34


def changes(title: str, told: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """An SVG with a line for each named change: by how much the loss differs, with its 95 % interval, on one axis that
    holds 0. Changes that the rows tell from none are in colour. "" where there is nothing to show."""
    shown = [(name, own) for name, own in told if is_number(own.get("difference"))]
    if not shown:
        return ""
    ends = [0.0, *(value for _, own in shown for value in (own["difference"], *(own.get("interval") or ())))]
    ends = [value for value in ends if math.isfinite(value)]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.04 or 1.0
    low, high = low - room, high + room
    bottom = LINE * len(shown) + 8

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    parts = _axis(low, high, bottom, x)
    for n, (name, own) in enumerate(shown):
        parts += _line(name, own, n * LINE + 15, x)
    label = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + FOOT}" role="img" aria-label="{label}"><title>{label}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _axis(low: float, high: float, bottom: int, x: Any) -> list[str]:
    parts, places = [], ticks(low, high, 5)
    for value, name in zip(places, tick_names(places), strict=True):
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="2" y2="{bottom}"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    parts.append(f'<line class="axis" x1="{x(0)}" x2="{x(0)}" y1="2" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 30}" text-anchor="middle">change of the loss</text>')
    return parts


def _line(name: str, own: Mapping[str, Any], y: int, x: Any) -> list[str]:
    interval, better = own.get("interval"), own.get("better")
    kind = "costs" if better is False else "gains" if better else "even"
    words = f"{name}: {number(own['difference'])}"
    parts = [f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>']
    if interval and all(math.isfinite(end) for end in interval):
        words += f", {number(interval[0])} to {number(interval[1])}"
        parts.append(f'<line class="interval {kind}" x1="{x(interval[0])}" x2="{x(interval[1])}" y1="{y}" y2="{y}"/>')
    place = f'cx="{x(own["difference"])}" cy="{y}" r="3.5"'
    return [*parts, f'<circle class="dot {kind}" {place}><title>{escape(words)}</title></circle>']


@dataclass(frozen=True)
class Heat:
    """A table of norms: a line for each block, a column for each module in it; a cell is its words and its share of the
    largest, None where nothing is there."""

    columns: Sequence[str]
    lines: Sequence[tuple[str, Sequence[tuple[str, float] | None]]]


def heat(modules: Sequence[Mapping[str, Any]], key: str = "relative_norm") -> Heat | None:
    """What each module's `key` is, by block; None where no module in a block has one."""
    cells: dict[int, dict[str, float]] = {}
    for own in modules:
        if is_number(own.get(key)) and own.get("layer") is not None:
            name = str(own["path"]).rpartition(".")[2]
            block = cells.setdefault(int(own["layer"]), {})
            block[name] = max(block.get(name, 0.0), own[key])
    columns = list(dict.fromkeys(name for block in cells.values() for name in block))
    most = max((value for block in cells.values() for value in block.values()), default=0.0)
    if not columns or not most:
        return None
    lines = [
        (str(layer), [(f"{block[c]:.2%}", block[c] / most) if c in block else None for c in columns])
        for layer, block in sorted(cells.items())
    ]
    return Heat(columns, lines)
