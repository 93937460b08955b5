"""docs/from-peft.md says what is read of HF PEFT's config: every line of its table runs, beside HF PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch

import inlay
from inlay.errors import FormatError
from inlay.methods.peft_fields import COMMON
from inlay.methods.table import METHODS
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parent.parent / "docs" / "from-peft.md"
ROW = re.compile(r"^\| `(\w+)` \| ([A-Z0-9_, ]+|all) \| `(.*)` \| (read|passed over|refused) \|$", re.MULTILINE)
FIELDS = {kind.peft_type: kind.peft_fields for kind in METHODS.values() if kind.peft_type and kind.peft_fields}
ROWS = [
    (kind, name, json.loads(value), here)
    for name, kinds, value, here in ROW.findall(PAGE.read_text(encoding="utf8"))
    for kind in (FIELDS if kinds == "all" else kinds.split(", "))
]
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
SIZES = dict(num_layers=2, task_type="CAUSAL_LM")
USUAL = {
    "LORA": dict(r=2, target_modules=["q_proj", "v_proj"]),
    "ADALORA": dict(target_r=1, init_r=2, total_step=9, target_modules=["q_proj", "v_proj"]),
    "IA3": dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VERA": dict(r=2, target_modules=["q_proj", "o_proj"]),
    "LOHA": dict(r=2, **(PAIR := dict(target_modules=["q_proj", "v_proj"]))),
    "LOKR": dict(r=2, **PAIR),
    "MISS": dict(r=4, **PAIR),
    "OFT": dict(oft_block_size=4, **PAIR),
    "BOFT": PAIR,
    "HRA": dict(r=4, **PAIR),
    "HIRA": dict(r=3, **PAIR),
    "ROAD": dict(group_size=8, **PAIR),
    "RANDLORA": dict(r=5, **PAIR),
    "PVERA": dict(r=2, **PAIR),
    "C3A": dict(block_size=8, **PAIR),
    "GRALORA": dict(r=4, **PAIR),
    "SHIRA": dict(r=2, random_seed=3, **PAIR),
    "TRAINABLE_TOKENS": dict(token_indices=[5, 9]),
    "LN_TUNING": dict(target_modules=["input_layernorm", "norm"]),
    "PREFIX_TUNING": dict(num_virtual_tokens=2, token_dim=8, num_attention_heads=2, **SIZES),
    "PROMPT_TUNING": (PROMPT := dict(num_virtual_tokens=2, token_dim=16, num_attention_heads=4, **SIZES)),
    "P_TUNING": PROMPT,
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "ADAPTION_PROMPT": dict(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say:", "tokenizer_name_or_path": "some/base"}
WITH = {
    "layers_pattern": {"layers_to_transform": [0]},
    "rank_pattern": {"alpha_pattern": {"v_proj": 3}},
    "prompt_tuning_init": TEXT,
    "tokenizer_kwargs": TEXT,
    "mini_r": {"init_weights": "mini"},
    "r": {"oft_block_size": 0},
    "boft_block_num": {"boft_block_size": 0},
}
"""What a field needs beside it, where the type has such a field."""
CONFIGS = {t.name: kind for t, kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
NEAR = {"rtol": 1e-4, "atol": 3e-5}


def base(name="", kind=""):
    other = {"target_parameters": "qwen3_moe"}.get(name, "qwen2")
    return make("llama" if kind == "ADAPTION_PROMPT" else other, dtype=torch.float32)


def needed(kind, name):
    return {key: value for key, value in WITH.get(name, {}).items() if key in FIELDS[kind].defaults()}


def saved(kind, folder, name="", **fields):
    """An adapter of the reference's, with random parameters; its logits, without those of virtual tokens."""
    config = CONFIGS[kind](**{**USUAL[kind], **needed(kind, name), **fields})
    model = peft.get_peft_model(base(name, kind), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return there(folder, name)


def there(folder, name=""):
    config = json.loads((folder / "adapter_config.json").read_text())
    more = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if "num_tasks" in config else {}
    model = peft.PeftModel.from_pretrained(base(name, config["peft_type"]), folder).eval()
    return model(input_ids=IDS, **more).logits[:, -IDS.shape[1] :]


def here(folder, name=""):
    config = json.loads((folder / "adapter_config.json").read_text())
    bank = inlay.attach(base(name, config["peft_type"]))
    bank.load("a", folder, task=0 if "num_tasks" in config else None)
    bank.set("a")
    return bank.model(input_ids=IDS).logits


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_page_has_each_field_as_the_code_has_it():
    told = {(kind, name, said) for kind, name, _, said in ROWS}
    groups = {"read": "read", "passed over": "passed", "refused": "refused"}
    known = {
        (kind, name, said) for kind, fields in FIELDS.items() for said, group in groups.items()
        for name in getattr(fields, group)
    }  # fmt: skip
    known |= {(kind, name, "passed over") for kind in FIELDS for name in COMMON.passed} | {
        ("LORA", "peft_type", "read")
    }
    assert told == known and len(told) == len(ROWS) and ROWS


@pytest.mark.parametrize(("kind", "name", "value"), [row[:3] for row in ROWS if row[3] == "read"])
def test_what_is_read_gives_the_logits_of_the_reference(kind, name, value, tmp_path):
    fields = {} if name == "peft_type" else {name: value}
    expected = saved(kind, tmp_path, name, **fields)
    written = json.loads((tmp_path / "adapter_config.json").read_text())[name]
    assert sorted(written) == sorted(value) if isinstance(value, list) else written == value
    torch.testing.assert_close(here(tmp_path, name), expected, **NEAR)


@pytest.mark.parametrize(("kind", "name", "value"), [row[:3] for row in ROWS if row[3] == "passed over"])
def test_what_is_passed_over_changes_no_logits_there_either(kind, name, value, tmp_path):
    expected = saved(kind, tmp_path)
    before = here(tmp_path)
    torch.testing.assert_close(before, expected, **NEAR)
    edit(tmp_path, **{**needed(kind, name), name: value})
    assert torch.equal(here(tmp_path), before)
    torch.testing.assert_close(there(tmp_path), expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    for kind in {row[0] for row in ROWS if row[3] == "refused"}:
        saved(kind, folder / kind)
    return folder


@pytest.mark.parametrize(("kind", "name", "value"), [row[:3] for row in ROWS if row[3] == "refused"])
def test_what_is_refused_is_refused_by_name(kind, name, value, usual, tmp_path):
    for file in (usual / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert json.loads((tmp_path / "adapter_config.json").read_text())[name] == FIELDS[kind].refused[name]
    edit(tmp_path, **{name: value})
    with pytest.raises(FormatError, match=rf"sets {name} to .*not supported"):
        here(tmp_path)
