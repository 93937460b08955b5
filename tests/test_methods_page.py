"""docs/methods.md says of every type of HF PEFT, and of every string of AdapterHub, whether it is here; and the rates
that methods begin to learn with are near the best of those that were tried."""

from __future__ import annotations

import importlib.util
import json
import math
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

HERE = Path(__file__).resolve().parents[1]
PAGE = (HERE / "docs" / "methods.md").read_text(encoding="utf8")
ROWS = {
    row[1]: (row[2].strip(), row[3].strip())
    for row in re.finditer(r"^\| (\S+) \| ([^|]+) \| ([^|]+) \|(?: [^|]+ \| [^|]+ \|)?$", PAGE, re.M)
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


# ---- learning rates

CHANCE = math.log(2)
ONE_SEED = 0.06
"""By how much the loss of the same settings moved between the seeds and machines that were tried."""


def parts_of_benchmark():
    spec = importlib.util.spec_from_file_location("method_parts", HERE / "benchmarks" / "method_parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses():
    """Case -> rate -> the losses that were measured with it, a third of which (or three times) is another rate."""
    found: dict[str, dict[float, list[float]]] = {}

    def add(case, rate, loss):
        own = found.setdefault(case, {})
        own.setdefault(next((one for one in own if abs(math.log(one / rate)) < 0.5), rate), []).append(loss)

    for line in (HERE / "benchmarks" / "methods.jsonl").read_text(encoding="utf8").splitlines():
        cell = json.loads(line)
        for rate, loss in cell.get("tried", {}).items():
            add(cell["case"], float(rate), loss)
    for line in (HERE / "benchmarks" / "learning_rates.jsonl").read_text(encoding="utf8").splitlines():
        cell = json.loads(line)
        if not cell["settings"] and "loss" in cell:
            add(cell["case"], cell["rate"], cell["loss"])
    return found


def test_default_rates_are_near_the_best_that_were_tried():
    parts, off = parts_of_benchmark(), {}
    for case, own in losses().items():
        name, settings = parts.CASES[case]
        usual = METHODS[name](**settings).usual_rate
        means = {rate: sum(several) / len(several) for rate, several in own.items()}
        nearest = means[min(means, key=lambda rate: abs(math.log(rate / usual)))]
        learned = min(means.values()) < CHANCE
        if learned and nearest > min(means.values()) + ONE_SEED:
            off[case] = usual, means
    assert not off
