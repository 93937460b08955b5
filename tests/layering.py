"""What the source must keep: imports that point down, no circles, small files and functions, one table of methods.

`PYTHONPATH=tests python -m layering [FOLDER]` lists what breaks a rule, a line each; FOLDER holds the package `inlay`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from forks import forks

__all__ = ["MODULE_LINES", "RANKS", "Tree", "circles", "faults", "long_functions", "long_modules", "unranked", "upward"]

RANKS = [
    {"errors"}, {"files"}, {"values"}, {"sites"}, {"kernels"}, {"methods"}, {"batch"}, {"formats"}, {"bases"}, {"bank"},
    {"data"}, {"runtime"}, {"evaluation", "training"}, {"reporting"}, {"runs"},
    {"inspection", "integrations", "merging", "planning", "race", "serve"}, {"cli"},
]  # fmt: skip
"""Lowest first. A package imports from lower ranks alone, not from those of its own rank."""
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
MODULE_LINES, FUNCTION_LINES = 300, 40
ROOT = "inlay"
FREE = f"{ROOT}.__version__"
"""The one name of the root that everybody may import: it brings nothing along."""
DOTTED = re.compile(rf"{ROOT}\.({'|'.join(RANK)})(\.\w+)*")


@dataclass(frozen=True)
class Import:
    """One name that a module imports, by its dotted path from the root: inlay.data.chat or inlay.data.chat.Chat."""

    line: int
    name: str


class Tree:
    """The modules below `source`, the folder of the package `inlay`, by dotted name."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.files = {self._dotted(file): file for file in sorted(source.rglob("*.py"))}
        self.parsed = {name: ast.parse(file.read_text(encoding="utf8")) for name, file in self.files.items()}

    def _dotted(self, file: Path) -> str:
        parts = file.relative_to(self.source).with_suffix("").parts
        return ".".join((ROOT, *(part for part in parts if part != "__init__")))

    def at(self, module: str, line: int) -> str:
        return f"{self.files[module].relative_to(self.source.parent)}:{line}"

    def module(self, name: str) -> str:
        """The module that holds a dotted name: the longest part of it that is a file."""
        while name not in self.files and "." in name:
            name = name.rpartition(".")[0]
        return name

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """What each module imports from the package, anywhere in it: in functions and under TYPE_CHECKING too."""
        return {name: list(self._imports(name, tree)) for name, tree in self.parsed.items()}

    def _imports(self, module: str, tree: ast.Module) -> Iterator[Import]:
        package = module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]
        bound: dict[str, str] = {}  # names that stand for the whole package
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] != ROOT:
                        continue
                    if alias.name == ROOT or alias.asname is None:
                        bound[alias.asname or ROOT] = ROOT
                    if alias.name != ROOT:
                        yield Import(node.lineno, alias.name)
            elif isinstance(node, ast.ImportFrom):
                origin = _absolute("." * node.level + (node.module or ""), package)
                if origin.split(".")[0] == ROOT:
                    yield from (Import(node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        yield from _mentions(tree, package, bound)


def _mentions(tree: ast.Module, package: str, bound: dict[str, str]) -> Iterator[Import]:
    """Imports by other means: `inlay.x` behind `import inlay`, and module names in strings (`import_module`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield Import(node.lineno, f"{bound[node.value.id]}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield Import(node.lineno, node.value)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
        ):
            name = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
            if name.startswith(".") and isinstance(node.args[0], ast.Constant):
                yield Import(node.lineno, _absolute(name, package))
            elif name.startswith(f"{ROOT}.{{"):  # a name that is made up when it runs: from anywhere
                yield Import(node.lineno, name)


def _absolute(name: str, package: str) -> str:
    """A dotted name without leading dots; one dot is the package itself, each further one the package above."""
    bare = name.lstrip(".")
    if dots := len(name) - len(bare):
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - dots + 1], *([bare] if bare else [])])
    return bare


def _package(module: str) -> str:
    """The ranked package of a dotted name; "inlay" for the root itself, whose names come from everywhere."""
    parts = module.split(".")
    return ROOT if len(parts) < 2 else "cli" if parts[1] == "__main__" else parts[1]


def unranked(tree: Tree) -> list[str]:
    """Packages and modules beside them that have no rank."""
    found = {_package(name): name for name in reversed(tree.files) if name != ROOT}
    return [f"{tree.at(name, 1)}: {own} has no rank" for own, name in sorted(found.items()) if own not in RANK]


def upward(tree: Tree) -> list[str]:
    """Imports from a package of a higher or the same rank, or from the root."""
    found = []
    for module, imports in tree.imports.items():
        own = _package(module)
        if own not in RANK:
            continue
        for one in imports:
            other = _package(one.name)
            known = other in RANK
            if other != own and one.name != FREE and (not known or RANK[other] >= RANK[own]):
                way = "upward" if not known or RANK[other] > RANK[own] else "sideways"
                found.append(f"{tree.at(module, one.line)}: {own} imports {one.name}, {way}")
    return found


def circles(tree: Tree) -> list[str]:
    """Circles of files of one package, the shortest one through each file that has one, each once."""
    edges: dict[str, dict[str, int]] = {name: {} for name in tree.files}
    for module, imports in tree.imports.items():
        for one in imports:
            other = tree.module(one.name)
            if other != module and other in edges and _package(other) == _package(module) != ROOT:
                edges[module].setdefault(other, one.line)
    found: dict[frozenset[str], str] = {}
    for start in edges:
        if path := _way_back(edges, start):
            words = " -> ".join([*path, start])
            found.setdefault(frozenset(path), f"{tree.at(start, edges[start][[*path, start][1]])}: circle {words}")
    return list(found.values())


def _way_back(edges: dict[str, dict[str, int]], start: str) -> list[str]:
    """The shortest way from `start` to itself, without its end; [] where there is none."""
    ways, seen = [[start]], {start}
    while ways:
        longer = []
        for way in ways:
            for other in edges[way[-1]]:
                if other == start:
                    return way
                if other not in seen:
                    seen.add(other)
                    longer.append([*way, other])
        ways = longer
    return []


def long_modules(tree: Tree) -> list[str]:
    counts = {name: len(file.read_text(encoding="utf8").splitlines()) for name, file in tree.files.items()}
    return [f"{tree.at(name, 1)}: {count} lines" for name, count in counts.items() if count > MODULE_LINES]


def long_functions(tree: Tree) -> list[str]:
    """Functions of too many lines, from the first decorator to the last line; nested ones count on their own too."""
    found = []
    for module, parsed in tree.parsed.items():
        for node in ast.walk(parsed):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = (node.end_lineno or first) - first + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{tree.at(module, first)}: {node.name} has {lines} lines")
    return found


def method_forks(tree: Tree) -> list[str]:
    """Places outside the one table that ask which method they have."""
    return [f"{tree.at(module, line)}: {what}" for module, line, what in forks(tree.parsed, ROOT)]


CHECKS = (unranked, upward, circles, long_modules, long_functions, method_forks)


def faults(source: Path) -> list[str]:
    """All that breaks a rule below `source`, one line each."""
    tree = Tree(source)
    return [line for check in CHECKS for line in check(tree)]


if __name__ == "__main__":
    listed = faults(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "src" / ROOT))
    print("\n".join(listed))
    sys.exit(bool(listed))
