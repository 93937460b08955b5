"""The file of finished cells: one JSON object a line, appended as they are done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .verdicts import Cell

__all__ = ["Store"]

Key = tuple[str, str, str, str]


class Store:
    """Cells by use, type, method and law; the last line of a key counts, a broken last line is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[Key, Cell] = {}
        if path.exists():
            for line in path.read_text(encoding="utf8").splitlines():
                try:
                    self._keep(Cell(**json.loads(line)))
                except (ValueError, TypeError):
                    continue

    def _keep(self, cell: Cell) -> None:
        self.cells[cell.use, cell.type_name, cell.method, cell.law] = cell

    def add(self, cells: Iterable[Cell]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf8") as file:
            for cell in cells:
                self._keep(cell)
                file.write(json.dumps(asdict(cell)) + "\n")

    def forget(self, jobs: Iterable[tuple[str, str]], laws: Iterable[str]) -> None:
        """Drop the cells of some types and laws, so that they are done again."""
        jobs, laws = set(jobs), {*laws, "build", "add"}
        self.cells = {k: c for k, c in self.cells.items() if (c.use, c.type_name) not in jobs or c.law not in laws}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(json.dumps(asdict(c)) + "\n" for c in self.cells.values()), encoding="utf8")
        beside.replace(self.path)

    def missing(self, use: str, type_name: str, methods: Iterable[str], laws: Iterable[str]) -> list[str]:
        """Laws of which a cell is missing: none where the type was not built or a law's whole cell says why."""
        build = self.cells.get((use, type_name, "", "build"))
        if build is None:
            return list(laws)
        if build.status != "right":
            return []
        usable = [m for m in methods if (use, type_name, m, "add") not in self.cells]
        return [
            law
            for law in laws
            if (use, type_name, "", law) not in self.cells
            and not all((use, type_name, m, law) in self.cells for m in usable)
        ]
