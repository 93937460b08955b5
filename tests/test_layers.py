"""Packages import downwards only, and no code but the table of methods asks which method it has."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "inlay"
LAYERS = [
    {"errors", "files", "values"},
    {"sites", "kernels", "methods", "batch"},
    {"bases", "formats", "data", "bank"},
    {"runtime"},
    {"training", "evaluation"},
    {"runs", "reporting", "merging", "integrations"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("inlay."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("inlay.")}
    return found


def test_every_import_points_down_or_sideways():
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        own = "cli" if own == "__main__" else own
        for other in imported(ast.parse(file.read_text(encoding="utf8"))):
            assert HEIGHT[other] <= HEIGHT[own], f"{file} imports inlay.{other}"


def test_every_package_has_its_place():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == {name for name in HEIGHT if (SOURCE / name).is_dir()}


def test_methods_know_torch_errors_and_where_they_stand():
    known = {"errors", "kernels", "sites", "methods", "values"}
    for file in (SOURCE / "methods").glob("*.py"):
        assert imported(ast.parse(file.read_text(encoding="utf8"))) <= known, file


def test_modules_stay_small():
    for file in SOURCE.rglob("*.py"):
        assert len(file.read_text(encoding="utf8").splitlines()) <= 330, file


def test_public_names_exist():
    import inlay

    assert all(getattr(inlay, name) is not None for name in inlay.__all__)
