"""docs/methods.md says of every type of HF PEFT, and of every string of AdapterHub, whether it is here."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest

import inlay
from inlay.errors import FormatError
from inlay.files import write_json
from inlay.formats.support import ADAPTERHUB_CONFIGS, PEFT_TYPES
from inlay.methods.table import GROUPS, METHODS
from zoo import make

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf8")
ROWS = {
    row[1]: (row[2].strip(), row[3].strip()) for row in re.finditer(r"^\| (\S+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M)
}


def test_every_type_of_peft_has_a_row_that_is_true():
    assert set(PEFT_TYPES) == {str(kind.value) for kind in peft.PeftType}
    for kind, title in PEFT_TYPES.items():
        here = [f"`{name}`" for name, method in METHODS.items() if method.peft_type == kind]
        said = ROWS[kind][1]
        assert ROWS[kind][0] == title
        assert said == ", ".join(here) if here else said.startswith("cannot be" if kind == "LILY" else "not yet")


@pytest.mark.parametrize("kind", [k for k in PEFT_TYPES if k not in {m.peft_type for m in METHODS.values()}])
def test_a_type_that_is_not_here_is_refused_by_its_name(kind, tmp_path):
    write_json(tmp_path / "adapter_config.json", {"peft_type": kind, "target_modules": ["q_proj"]})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=re.escape(f"{PEFT_TYPES[kind]} ({kind})")):
        inlay.attach(make("llama")).load("a", tmp_path)


def test_every_string_of_adapterhub_has_a_row_of_a_method_that_is_here():
    for string, title in ADAPTERHUB_CONFIGS.items():
        assert ROWS[string][0] == title
        names = re.findall(r"`([^`]+)`", ROWS[string][1])
        assert names or ROWS[string][1].startswith("not yet")
        assert all(name in METHODS for name in names)


def test_the_groups_hold_every_method_once():
    named = [name for group in GROUPS.values() for name in group]
    assert sorted(named) == sorted(METHODS) and len(named) == len(set(named))
