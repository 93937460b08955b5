"""Packages import downwards only, files stay small, and no code but the table of methods asks which method it has.

Each rule is tried on a small wrong tree too (`PLANTED`): a check that sees nothing would let everything pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from layering import (
    FUNCTION_LINES,
    MODULE_LINES,
    RANKS,
    Tree,
    circles,
    faults,
    long_functions,
    long_modules,
    method_forks,
    unranked,
    upward,
)

SOURCE = Path(__file__).parent.parent / "src" / "inlay"


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(SOURCE)


def listed(lines: list[str]) -> str:
    return "\n".join(["", *lines])


def test_every_package_has_a_rank_and_every_rank_a_package(tree):
    assert not unranked(tree), listed(unranked(tree))
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {name for names in RANKS for name in names} <= there


def test_every_import_points_down(tree):
    assert not upward(tree), listed(upward(tree))


def test_no_circle_of_files_inside_a_package(tree):
    assert not circles(tree), listed(circles(tree))


def test_modules_stay_small(tree):
    assert not long_modules(tree), listed(long_modules(tree))


def test_functions_stay_small(tree):
    assert not long_functions(tree), listed(long_functions(tree))


def test_no_code_but_the_table_asks_which_method_it_has(tree):
    assert not method_forks(tree), listed(method_forks(tree))


def test_methods_know_torch_errors_and_where_they_stand(tree):
    known = {"errors", "kernels", "sites", "methods", "values"}
    for module, imports in tree.imports.items():
        if module.startswith("inlay.methods."):
            assert {one.name.split(".")[1] for one in imports} <= known, module


def test_public_names_exist():
    import inlay

    assert all(getattr(inlay, name) is not None for name in inlay.__all__)


# ---- the checks themselves, on trees that are wrong in one place

RIGHT = {
    "__init__.py": "from importlib import import_module\nWHERE = {'LoRA': 'inlay.methods.lora'}\n__version__ = '1'\n",
    "__main__.py": "from inlay.cli.app import main\n",
    "errors.py": "",
    "sites/__init__.py": "",
    "sites/site.py": "from inlay.errors import X\n",
    "methods/__init__.py": "",
    "methods/contract.py": "from inlay.sites.site import Site\nclass Method: ...\n",
    "methods/lora.py": "from .contract import Method\nclass LoRA(Method):\n    peft_type = 'LORA'\n",
    "methods/prompt.py": "from .contract import Method\nclass PromptTuning(Method):\n    peft_type = 'PROMPT_TUNING'\n",
    "methods/table.py": "CLASSES = {'lora': 'lora.LoRA', 'prompt': 'prompt.PromptTuning'}\n",
    "data/__init__.py": "",
    "data/rows.py": "from .words import w\n\ndef f():\n    from inlay.methods.lora import LoRA\n    return LoRA()\n",
    "data/words.py": "import inlay\nw = inlay.__version__\nkind = 'inlay.json'\nk = 'x' == 'prompt' or {'lora': 1}\n",
    "evaluation/__init__.py": "",
    "training/__init__.py": "",
    "training/loop.py": "from inlay.data import rows\nimport inlay.data.words as w\n",
    "cli/__init__.py": "",
    "cli/app.py": "from ..training import loop\nCOMMANDS = {'train': 'inlay.cli.app'}\n",
}
LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES

WORDS, LOOP = "data/words.py", "training/loop.py"
PLANTED = {
    "an import upward": (WORDS, "from inlay.cli.app import main", "data imports inlay.cli.app.main, upward"),
    "a plain import": (WORDS, "import inlay.cli.app", "data imports inlay.cli.app, upward"),
    "an import with another name": (WORDS, "import inlay.cli.app as a", "data imports inlay.cli.app, upward"),
    "in a function": (WORDS, "def f():\n    from inlay.training import loop", "training.loop, upward"),
    "for types alone": (
        WORDS, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from inlay.cli.app import main",
        "data imports inlay.cli.app.main, upward",
    ),
    "with dots": (WORDS, "from ..cli.app import main", "data imports inlay.cli.app.main, upward"),
    "a package with dots": (WORDS, "from .. import cli", "data imports inlay.cli, upward"),
    "in a package's own file": ("data/__init__.py", "from ..cli import app", "data imports inlay.cli.app, upward"),
    "by attribute": (WORDS, "import inlay\ninlay.cli.app.main()", "data imports inlay.cli, upward"),
    "by attribute of another name": (WORDS, "import inlay as i\ni.cli.app", "data imports inlay.cli, upward"),
    "by attribute behind a module": (
        WORDS, "import inlay.errors\ninlay.cli.app", "data imports inlay.cli, upward",
    ),
    "a public name": (WORDS, "from inlay import LoRA", "data imports inlay.LoRA, upward"),
    "a public name by attribute": (WORDS, "import inlay\ninlay.attach", "data imports inlay.attach, upward"),
    "by a string": (WORDS, "m = import_module('inlay.cli.app')", "data imports inlay.cli.app, upward"),
    "by a string with dots": (WORDS, "m = import_module('..cli.app', x)", "data imports inlay.cli.app, upward"),
    "by a string that is made up": (WORDS, "m = import_module(f'inlay.{x}.app')", "data imports inlay.{x}.app, upward"),
    "by __import__": (WORDS, "m = __import__('inlay.cli.app')", "data imports inlay.cli.app, upward"),
    "all names": (WORDS, "from inlay.cli.app import *", "data imports inlay.cli.app.*, upward"),
    "sideways": (LOOP, "from inlay.evaluation import x", "training imports inlay.evaluation.x, sideways"),
    "from the lowest": ("errors.py", "from inlay.sites.site import Site", "errors imports inlay.sites.site"),
    "a package without a rank": ("newest/__init__.py", "", "newest has no rank"),
    "a module without a rank": ("newest.py", "x = 1", "newest has no rank"),
    "a circle": (WORDS, "from .rows import f", "circle inlay.data.rows -> inlay.data.words -> inlay.data.rows"),
    "a circle for types": (
        WORDS, "if TYPE_CHECKING:\n    from inlay.data.rows import f", "circle inlay.data.rows",
    ),
    "a circle in functions": (WORDS, "def f():\n    from . import rows", "circle inlay.data.rows"),
    "a circle of three": ("methods/contract.py", "def f():\n    from .middle import m", "circle inlay.methods"),
    "a long module": (WORDS, "x = 1\n" * MODULE_LINES, f"{MODULE_LINES + 5} lines"),
    "a long function": (WORDS, LONG, "f has 41 lines"),
    "a decorated function": (
        WORDS, "@cache\n" + LONG.replace("    x = 1\n", "", 1), "f has 41 lines",
    ),
    "a long docstring": (
        WORDS, 'def f():\n    """A.\n' + "\n" * FUNCTION_LINES + '    """', "f has 43 lines",
    ),
    "a long coroutine": (WORDS, "async " + LONG, "f has 41 lines"),
    "a long method": (WORDS, "class A:\n    " + LONG.replace("\n", "\n    "), "f has 41 lines"),
    "a long function inside": (
        WORDS, "def g():\n    " + LONG.replace("\n", "\n    "), "g has 42 lines", "f has 41 lines",
    ),
    "isinstance": (LOOP, "if isinstance(m, LoRA): pass", "asks which method: isinstance(m, LoRA)"),
    "isinstance of several": (LOOP, "x = isinstance(m, (int, lora.LoRA))", "asks which method"),
    "isinstance of a union": (LOOP, "x = isinstance(m, int | LoRA)", "asks which method"),
    "issubclass": (LOOP, "x = 1 if issubclass(m, LoRA) else 2", "asks which method"),
    "its type": (LOOP, "x = type(m) is LoRA", "asks which method: type(m) is LoRA"),
    "its type among some": (LOOP, "x = type(m) in (LoRA, PromptTuning)", "asks which method"),
    "its name": (LOOP, "while name == 'lora': pass", "asks which method: name == 'lora'"),
    "not its name": (LOOP, "x = [m for m in ms if m.method != 'prompt']", "asks which method"),
    "its name among some": (LOOP, "if method in ('prompt',): pass", "asks which method"),
    "its class's name": (LOOP, "if type(m).__name__ == 'LoRA': pass", "asks which method"),
    "what peft calls it": (LOOP, "if config['peft_type'] == 'LORA': pass", "asks which method"),
    "a match of classes": (LOOP, "match m:\n    case LoRA(): pass", "asks which method"),
    "a match of names": (LOOP, "match m.method:\n    case 'prompt' | 'x': pass", "asks which method"),
    "a table of classes": (LOOP, "x = {LoRA: 1, PromptTuning: 2}[type(m)]", "asks which method"),
    "a table of names": (LOOP, "x = {'lora': 1, 'prompt': 2}[m]", "asks which method"),
    "a method that asks": ("methods/prompt.py", "x = type(m) is LoRA", "asks which method"),
}  # fmt: skip
MORE = {"a circle of three": {"methods/middle.py": "from .lora import LoRA\n"}}
"""Further files of a planted fault."""


def planted(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf8")
    return folder


def test_a_right_tree_has_no_faults(tmp_path):
    assert faults(planted(tmp_path / "inlay", RIGHT)) == []


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_found_where_it_is(tmp_path, name):
    file, text, *words = PLANTED[name]
    files = {**RIGHT, **MORE.get(name, {})}
    files[file] = files.get(file, "") + text + "\n"
    found = faults(planted(tmp_path / "inlay", files))
    assert len(found) == len(words), found
    for line, expected in zip(found, words, strict=True):
        assert line.startswith("inlay/") and expected in line
