"""The picture of prefix_cost.py: time of a step by virtual tokens, one panel a method, one curve a length of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from inlay.reporting.charts import HEIGHT, LEFT, WIDTH, Line, lines

__all__ = ["plot"]

COLOURS = ("--blue", "--orange", "--green", "--red")
GAP, TITLE, LEGEND = 16, 24, 30
STYLE = (
    "svg{--ink:#23211d;--soft:#655f55;--rule:#e4e0d8;--grey:#857f74;--card:#fff;--blue:#2f6db3;--orange:#b9560f;"
    "--green:#34784a;--red:#b3322f}.back{fill:var(--card)}text{font:11px system-ui,sans-serif;fill:var(--soft)}"
    ".title{font-size:13px;fill:var(--ink)}.grid{stroke:var(--rule)}.axis{stroke:var(--grey)}"
    ".curve{fill:none;stroke-width:1.6;stroke-linejoin:round}"
    "@media(prefers-color-scheme:dark){svg{--ink:#e9e5dd;--soft:#aaa498;--rule:#3d3a35;--grey:#969085;--card:#22201d;"
    "--blue:#74a9e3;--orange:#e39a5c;--green:#7fbf90;--red:#e8918d}}"
)


def plot(curves: Mapping[tuple[str, int], Sequence[tuple[float, float]]]) -> str:
    """An SVG that stands alone; `curves` are (virtual tokens, times that of none) by method and length of rows."""
    methods = list(dict.fromkeys(method for method, _ in curves))
    lengths = list(dict.fromkeys(length for _, length in curves))
    colours = dict(zip(lengths, COLOURS, strict=False))
    width, height = len(methods) * WIDTH + (len(methods) - 1) * GAP, TITLE + HEIGHT + LEGEND
    parts = [f'<rect class="back" width="{width}" height="{height}"/>']
    for number, method in enumerate(methods):
        own = [
            Line(f"rows of {length:,}", points, colours[length], dots=True)
            for (name, length), points in curves.items() if name == method
        ]  # fmt: skip
        left, title = number * (WIDTH + GAP), f"{method} tuning: a step, as a multiple of none's"
        panel = lines(title, own, "virtual tokens").partition("</svg>")[0].partition(">")[2]
        parts.append(f'<text class="title" x="{left + LEFT}" y="16">{escape(title)}</text>')
        parts.append(f'<g transform="translate({left} {TITLE})">{panel}</g>')
    for number, length in enumerate(lengths):
        x, y = LEFT + number * 130, height - 12
        parts.append(f'<path d="M{x} {y - 4}h18" style="stroke:var({colours[length]})" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">rows of {length:,}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )
