"""Finds code that asks which method it has: only the table of methods may know."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

__all__ = ["forks"]

ORDINARY = {"norm", "prefix", "prompt", "head", "block"}
"""Methods' names that are words for other things as well: what they are compared with must speak of methods."""


def forks(parsed: Mapping[str, ast.Module], root: str = "inlay") -> Iterator[tuple[str, int, str]]:
    """(module, line, what it does) for each comparison with a method's class or name, and each table by methods."""
    classes = _classes(parsed, f"{root}.methods")
    names = _names(parsed, f"{root}.methods", classes)
    for module, tree in parsed.items():
        if module in (root, f"{root}.methods.table"):  # the root lists the public names
            continue
        for node in ast.walk(tree):
            if any(_asks(node, classes, names)):
                line = getattr(node, "lineno", 1)
                yield module, line, f"asks which method: {ast.unparse(node).splitlines()[0][:60]}"


def _classes(parsed: Mapping[str, ast.Module], package: str) -> set[str]:
    """Names of the classes below `Method`, however far."""
    bases: dict[str, set[str]] = {}
    for module, tree in parsed.items():
        if module.startswith(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {_last(base) for base in node.bases}
    found = {"Method"}
    while more := {name for name, own in bases.items() if own & found} - found:
        found |= more
    return found - {"Method"}


def _names(parsed: Mapping[str, ast.Module], package: str, classes: set[str]) -> set[str]:
    """What people and other libraries call the methods: the table's keys, and each class's `peft_type`."""
    table = parsed.get(f"{package}.table")
    found = {
        str(key.value)
        for node in (ast.walk(table) if table else ())
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    for tree in parsed.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in classes:
                for line in node.body:
                    target = line.target if isinstance(line, ast.AnnAssign) else None
                    target = line.targets[0] if isinstance(line, ast.Assign) else target
                    value = line.value if isinstance(line, (ast.Assign, ast.AnnAssign)) else None
                    if isinstance(target, ast.Name) and target.id == "peft_type" and isinstance(value, ast.Constant):
                        found.add(str(value.value))
    return (found - {""}) | classes


def _asks(node: ast.AST, classes: set[str], names: set[str]) -> Iterator[bool]:
    if isinstance(node, ast.Call) and _last(node.func) in ("isinstance", "issubclass") and len(node.args) == 2:
        yield any(_last(one) in classes for one in _members(node.args[1]))
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        yield any(_last(one) in classes for side in sides for one in _members(side))
        words = {one.value for side in sides for one in _members(side) if isinstance(one, ast.Constant)} & names
        others = " ".join(ast.unparse(side) for side in sides if not isinstance(side, ast.Constant)).lower()
        yield bool(words - ORDINARY) or (bool(words) and ("method" in others or "peft_type" in others))
    elif isinstance(node, ast.MatchClass):
        yield _last(node.cls) in classes
    elif isinstance(node, ast.Match):
        values = {
            part.value.value
            for case in node.cases
            for part in ast.walk(case.pattern)
            if isinstance(part, ast.MatchValue) and isinstance(part.value, ast.Constant)
        } & names
        yield bool(values - ORDINARY) or (bool(values) and "method" in ast.unparse(node.subject).lower())
    elif isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else _last(key) for key in node.keys if key is not None]
        yield len({key for key in keys if key in names}) > 1 and bool({k for k in keys if k in names - ORDINARY})


def _members(node: ast.AST) -> list[ast.AST]:
    """What a tuple, list or set holds, `A | B` too; else the expression itself."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return list(node.elts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_members(node.left), *_members(node.right)]
    return [node]


def _last(node: ast.AST) -> str:
    """The last name of `a.b.C`; "" for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
