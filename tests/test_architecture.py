"""What docs/architecture.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
NAMED = sorted(set(re.findall(r"`([a-z_]+/[a-z_]+\.py)(?::([A-Za-z_]+))?`", PAGE)))


def names_of(file: Path) -> set[str]:
    """Everything a module defines at its top level."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_the_page_names_enough_to_be_of_use():
    assert len(NAMED) > 40
    assert {file.split("/")[0] for file, _ in NAMED} >= {
        "data",
        "training",
        "runtime",
        "bank",
        "batch",
        "kernels",
        "methods",
    }


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_it_names_exists(file, name):
    path = ROOT / file if file.startswith("tests/") else ROOT / "src" / "inlay" / file
    assert path.is_file(), file
    assert not name or name in names_of(path), f"{file} has no {name}"
