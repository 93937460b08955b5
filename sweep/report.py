"""The matrix: types as rows, laws as columns, and the sentences of what was refused."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from .choose import LAW_NAMES
from .uses import USES
from .verdicts import LATE, STATUSES, Cell

__all__ = ["matrix", "sentences", "summary", "worse", "write_page"]

MARKS = {"right": "✓", "refused": "R", "raw": "E", "wrong": "W", "base": "b", "untried": "·"}
LEGEND = (
    "✓ right, R refused, E raw error, W wrong, b the plain base breaks the law without Inlay, · not tried; the number "
    "counts methods."
)


def matrix(cells: Sequence[Cell]) -> str:
    """A table in Markdown."""
    laws = [law for law in ("add", *LAW_NAMES) if any(c.law == law for c in cells)]
    rows: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        rows[cell.use, cell.type_name].append(cell)
    order = list(USES)
    lines = [f"| type | {' | '.join(laws)} |", f"|---|{'---|' * len(laws)}"]
    for (use, name), own in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1])):
        if any(c.law == "build" and c.status != "right" for c in own):
            continue
        marks = [mark([c for c in own if c.law == law]) for law in laws]
        lines.append(f"| {use}:{name} | {' | '.join(marks)} |")
    return "\n".join(lines)


def mark(cells: Sequence[Cell]) -> str:
    counts = Counter(cell.status for cell in cells)
    if not counts:
        return ""
    return " ".join(
        f"{MARKS[s]}{counts[s]}" if len(counts) > 1 or s != "untried" else MARKS[s] for s in STATUSES if counts[s]
    )


def summary(cells: Sequence[Cell]) -> str:
    """Counts of types, of cells and of verdicts, in words."""
    built = {(c.use, c.type_name) for c in cells if c.law == "build" and c.status == "right"}
    tried = {(c.use, c.type_name) for c in cells if c.law == "build"}
    counts = Counter(c.status for c in cells if c.law != "build")
    counted = ", ".join(f"{counts[status]} {status}" for status in reversed(STATUSES))
    names = len({name for _, name in built})
    return f"{names} model types in {len(built)} uses (of {len(tried)} tried); {sum(counts.values())} cells: {counted}."


def sentences(cells: Iterable[Cell], status: str) -> dict[str, list[Cell]]:
    """Cells of one status by what they say, without its numbers and names; the commonest first."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.status == status:
            found[plain(cell.note)].append(cell)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def plain(note: str) -> str:
    note = re.sub(r"^(left|right|none|greedy|beams|no cache|recomputing|(not )?reentrant|b?float\d+): ", "", note)
    note = re.sub(r"(/tmp/[\w/.]+|'[\w.\[\]-]{1,80}'|\"[^\"]{1,80}\")", "…", note)
    return re.sub(r"\b\d+(\.\d+)?(e[+-]?\d+)?\b", "n", note)


def worse(path: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Cells of a type and a law of which the matrix of the page `path` says better: it counts fewer wrong and raw ones;
    or fewer refused and more right ones. Of a type that is not on the page nothing is known, nor of a process that was
    too slow."""
    lines = [
        line.strip("|").split("|") for line in path.read_text(encoding="utf8").splitlines() if line.startswith("|")
    ]
    table = [[field.strip() for field in line] for line in lines]
    laws, rows = table[0], {row[0]: row for row in table[2:]}
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        name = f"{cell.use}:{cell.type_name}"
        if name in rows and cell.law in laws and cell.note != LATE:
            groups[name, cell.law].append(cell)
    found: list[Cell] = []
    for (name, law), own in groups.items():
        bad = _worse(own, _counted(rows[name][laws.index(law)]))
        found += [cell for cell in own if cell.status in bad]
    return found


def _worse(cells: Sequence[Cell], said: Counter[str]) -> tuple[str, ...]:
    """The statuses of which there are more than a page `said`."""
    now = Counter(cell.status for cell in cells)
    if now["wrong"] + now["raw"] > said["wrong"] + said["raw"]:
        return "wrong", "raw"
    return ("refused",) if now["refused"] > said["refused"] and now["right"] < said["right"] else ()


def _counted(text: str) -> Counter[str]:
    """The inverse of `mark`."""
    statuses = {sign: status for status, sign in MARKS.items()}
    return Counter({statuses[field[0]]: int(field[1:] or 1) for field in text.split() if field[0] in statuses})


def write_page(path: Path, cells: Sequence[Cell]) -> None:
    """The page for people: what it is, the counts, the matrix, and what was refused."""
    parts = [
        "# Architectures\n",
        "Written by `make sweep`, which builds a tiny random model of every type that transformers registers and tries "
        "Inlay's laws on it with one method for each kind of site: LoRA, LoRA on the table of embeddings, IA³, norm "
        "tuning, Houlsby's bottlenecks, prefixes, prompts, a head of its own, LoReFT. `sweep/` says how.\n",
        summary(cells) + "\n",
        LEGEND + "\n",
        matrix(cells) + "\n",
    ]
    titles = {"wrong": "Wrong", "raw": "Raw errors", "refused": "Refused", "base": "Where the base breaks a law itself"}
    for status, title in titles.items():
        if found := sentences(cells, status):
            parts.append(f"## {title}\n")
            parts.append("".join(_entry(note, own) for note, own in found.items()))
    unbuilt = [c for c in cells if c.law == "build" and c.status != "right"]
    if unbuilt:
        parts.append("## Not built\n\nThe rules make no model of these that runs.\n")
        parts.append("".join(f"- {c.use}:{c.type_name}: {c.note[:160]}\n" for c in sorted(unbuilt, key=str)))
    path.write_text("\n".join(parts), encoding="utf8")


def _entry(note: str, cells: Sequence[Cell]) -> str:
    laws = ", ".join(dict.fromkeys(c.law for c in cells))
    methods = ", ".join(dict.fromkeys(c.method for c in cells if c.method))
    types = sorted({f"{c.use}:{c.type_name}" for c in cells})
    shown = ", ".join(types[:12]) + (f" and {len(types) - 12} more" if len(types) > 12 else "")
    return f"- {note[:200] or 'no word'} ({laws}; {methods or 'all'}): {len(types)} types: {shown}\n"
