"""What doctor says of machines that are well, and of those that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from inlay.bases import extras
from inlay.cli import doctor, jobs
from inlay.cli.app import app


def asked(*arguments):
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def told():
    done = asked("--json")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert done.exit_code == bool(found["troubles"])
    return found


@pytest.fixture
def alone(monkeypatch):
    """Without the machine's own free memory and disk, which may be short anywhere."""
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 0)
    monkeypatch.setattr(doctor, "LEAST_DISK", 0)


def test_a_machine_that_is_well(alone):
    found = told()
    assert found["troubles"] == [] and {"torch", "transformers", "gguf", "accelerate"} <= set(found["versions"])
    assert found["dtype"] in ("float32", "bfloat16") and found["gflops"] > 0 and found["pip"]
    if found["device"] == "cpu":
        assert found["gflops"] == max(found["gflops_a_core"].values())
    shown = asked()
    assert "✓ ready" in shown.stdout and found["dtype"] in shown.stdout


def test_it_names_the_extras_that_are_missing(alone, monkeypatch):
    def known(name):
        if name in ("bitsandbytes", "tensorboard"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", known)
    found = told()
    assert found["troubles"] == []  # nobody needs them before asking for them
    assert found["extras"]["quantize"]["missing"] == ["bitsandbytes>=0.46.1"]
    assert "--quantize 4bit: pip install 'bitsandbytes>=0.46.1'" in " ".join(asked().stdout.split())


@pytest.mark.parametrize("name", jobs.JOBS)
def test_a_library_that_is_there_and_does_not_work(name, alone, monkeypatch):
    def broken():
        raise OSError("libgone.so is not there\nand more")

    monkeypatch.setitem(jobs.JOBS, name, broken)
    [trouble] = told()["troubles"]
    assert trouble.startswith(f"{name} ") and "(libgone.so is not there)" in trouble and "pip install" in trouble
    assert f"✗ {name}" in asked().stdout


def test_a_library_that_is_missing_or_too_old(alone, monkeypatch):
    monkeypatch.setattr(extras, "plain_packages", lambda: ("nosuchthing>=3", "rich>=99", "pyyaml>=6"))
    first, second = sorted(told()["troubles"])
    assert first == "nosuchthing is missing. Run pip install 'nosuchthing>=3'"
    assert second.startswith("rich ") and "does not fit" in second


@pytest.mark.parametrize("module", ["torch", "transformers", "gguf", "accelerate", "bitsandbytes"])
def test_imports_that_break_are_a_line_and_no_traceback(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('broken for the test')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "inlay", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    troubles = json.loads(done.stdout)["troubles"]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(line.startswith(module) and "broken for the test" in line for line in troubles)
    assert sum("broken for the test" in line for line in troubles) == 1


def test_folders_memory_and_pip(alone, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INLAY_HOME", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 1e9)
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e9)
    monkeypatch.setattr(jobs.sys, "executable", "/bin/false")
    troubles = "\n".join(told()["troubles"])
    for part in ("INLAY_HOME", "of memory is free", "GB left", "pip cannot be used"):
        assert part in troubles


def test_it_is_checked_what_is_declared():
    """Each library that the package imports is one that an installation or an extra brings."""
    import ast
    from pathlib import Path

    import inlay

    lines = [*extras.plain_packages(), *(line for extra in extras.EXTRAS for line in extras.extra_packages(extra))]
    declared = {doctor._module(doctor._split(line)[0]) for line in lines}
    own = {"inlay", "triton", *sys.stdlib_module_names}  # torch brings Triton where CUDA is; it is looked for before
    for file in Path(inlay.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.partition(".")[0] in declared | own, f"{file.name} imports {name}"
