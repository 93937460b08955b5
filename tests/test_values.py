"""Settings are checked once, by name, against their declared types and ranges, wherever they come from."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import inlay
from inlay.data.yaml import read_yaml
from inlay.errors import FormatError, UsageError
from inlay.methods.table import CLASSES, METHODS
from inlay.runs.settings import PANELS, Settings, make_method
from inlay.training.optimizers import OPTIMIZERS
from inlay.training.plan import Plan
from inlay.values import fields_of

GIVEN = {"data": "a.csv", "out": "run"}
WORDS = {"0": ["bad"], "1": ["good", "great"]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lora", {"r": 8.5}), ("lora", {"r": True}), ("lora", {"r": "x"}), ("lora", {"r": None}), ("lora", {"r": 0}),
        ("lora", {"r": 10**30}), ("lora", {"alpha": -1}), ("lora", {"alpha": math.inf}), ("lora", {"alpha": "x"}),
        ("lora", {"alpha": [1]}), ("lora", {"targets": 5}), ("lora", {"targets": [5]}), ("lora", {"layers": 1.5}),
        ("lora", {"use_rslora": "maybe"}), ("lora", {"rank_pattern": 5}), ("lora", {"rank_pattern": {"q": "x"}}),
        ("lora", {"rank_pattern": {"[(": 4}}), ("lora", {"dropout": 1}), ("lora", {"dropout": math.nan}),
        ("houlsby", {"scaling": "x"}), ("houlsby", {"reduction_factor": 0}), ("pfeiffer", {"non_linearity": "gelo"}),
        ("prefix", {"num_virtual_tokens": 2.5}), ("prefix", {"num_virtual_tokens": 100_000}),
        ("prefix", {"encoder_hidden_size": -1}), ("prompt", {"init_text": 5}), ("prompt", {"init_ids": [-1]}),
        ("prompt", {"init": "words"}), ("norm", {"targets": "norm"}), ("ia3", {"feedforward": "down_proj"}),
    ],
)  # fmt: skip
def test_a_method_refuses_what_is_not_its_type_by_name(name, values):
    with pytest.raises(UsageError) as refused:
        make_method(name, values)
    key = next(iter(values))
    assert key in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(UsageError):  # not from the command alone
        METHODS[name](**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"r": 10.0}, {"r": 10}), ({"r": np.int64(4)}, {"r": 4}), ({"alpha": 5}, {"alpha": 5.0}),
        ({"layers": 5}, {"layers": 5}), ({"layers": [0, -1]}, {"layers": [0, -1]}),
        ({"targets": {"v_proj", "q_proj"}}, {"targets": ["q_proj", "v_proj"]}),
    ],
)  # fmt: skip
def test_a_method_takes_what_can_only_mean_one_thing(values, expected):
    made = inlay.LoRA(**values)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": None}, {"steps": "lots"}, {"steps": 0}, {"seed": "abc"}, {"seed": 2**63},
        {"data": 5}, {"data": []},
        {"lr": math.inf}, {"lr": 0}, {"lr": -1}, {"weight_decay": math.inf}, {"epochs": 1e300}, {"epochs": math.inf},
        {"epochs": math.nan}, {"memory_limit": 4}, {"memory_limit": "4"}, {"memory_limit": "0GB"}, {"max_length": 1},
        {"heldout": 1.5}, {"heldout": "nan"}, {"heldout": True}, {"limit": -3}, {"schedule": "up"}, {"dtype": "int3"},
        {"quantize": "8bit"}, {"method": "lora2"}, {"verbalizer": {0: 5}}, {"verbalizer": {0: []}}, {"verbalizer": "0"},
        {"columns": {"words": "x"}}, {"columns": {"text": 5}}, {"set": ["r"]}, {"set": ["r="]}, {"set": 5},
        {"template": 5}, {"gradient_checkpointing": "no"}, {"virtual_tokens_at": "end"}, {"split": "word"},
        {"out": None},
    ],
)  # fmt: skip
def test_a_run_refuses_what_cannot_be_by_name(wrong):
    with pytest.raises(UsageError) as refused:
        Settings(**{**GIVEN, **wrong})
    name = next(iter(wrong))
    said = str(refused.value)
    assert "\n" not in said and (
        name in said or {"quantize": "quantization", "virtual_tokens_at": "place"}[name] in said
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr": 1}, {"lr": 1.0}), ({"verbalizer": {0: "bad", 1: ["good", "great"]}}, {"verbalizer": WORDS}),
        ({"verbalizer": "0=bad,1=good|great"}, {"verbalizer": WORDS}), ({"heldout": 0.1}, {"heldout": "0.1"}),
        ({"memory_limit": "none"}, {"memory_limit": None}), ({"set": "r=8"}, {"set": {"r": 8}}),
        ({"set": ["r=1e1", "dropout=1e-1"]}, {"set": {"r": 10.0, "dropout": 0.1}}),
        ({"columns": "text=a, b,label=c.d[e]"}, {"columns": {"text": "a, b", "label": "c.d[e]"}}),
    ],
)  # fmt: skip
def test_a_run_takes_what_people_write(given, expected):
    made = Settings(**{**GIVEN, **given})
    assert {name: getattr(made, name) for name in expected} == expected


def test_yaml_means_what_it_looks_like():
    text = "{a: 1e-4, b: 5, c: no, d: 12:30, e: 010, f: 2024-01-01, g: true, h: ~, i: .5, j: 1_000}"
    assert read_yaml(text) == {
        "a": 1e-4, "b": 5, "c": "no", "d": "12:30", "e": 10, "f": "2024-01-01", "g": True, "h": None, "i": 0.5,
        "j": "1_000",
    }  # fmt: skip
    for broken in ("a: b: c", "[", "\0", "[" * 3000, "{a: &x *x}", "!!python/object:os.system {}"):
        with pytest.raises(ValueError) as refused:
            read_yaml(broken)
        assert "\n" not in str(refused.value)


def test_what_is_written_down_once_has_words_and_a_heading():
    for kind in (Settings, Plan, *METHODS.values()):
        for field in fields_of(kind):
            assert field.expected(), field.name
            if kind is not Plan:
                assert field.help.words, f"{kind.__name__}.{field.name}"
    assert {field.help.panel for field in fields_of(Settings)} <= set(PANELS)
    assert list(METHODS) == list(CLASSES) and all(METHODS[name]().usual_rate > 0 for name in METHODS)


def test_every_optimizer_that_is_named_can_be_made():
    import torch

    from inlay.training.optimizers import make_optimizer

    for name in OPTIMIZERS:
        assert make_optimizer(name, [{"params": [torch.nn.Parameter(torch.ones(8))], "lr": 0.1}], 0.1, 0.0)


def test_a_rank_beyond_every_target_is_not_taken(base_folder):
    import transformers as tf

    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    for r in (49, 33):
        method = inlay.LoRA(r=r)
        with pytest.raises(UsageError, match=f"r is {r}, more than model"):
            method.check_fit(method.sites(bank.base))
    method = inlay.LoRA(r=20)  # more than k and v have rows, not more than they have columns
    method.check_fit(method.sites(bank.base))
    with pytest.raises(UsageError, match="init_ids holds 9999999"):
        bank.add("text", inlay.PromptTuning(2, init_ids=[9999999]))
    assert inlay.LoRA(layers=-1).sites(bank.base)[0].layer == 1


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("adapter_config.json", {"r": "x"}, "r is 'x'"), ("adapter_config.json", {"lora_alpha": "x"}, "alpha"),
        ("adapter_config.json", {"target_modules": 5}, "adapter_config.json"),
        ("adapter_config.json", {"target_modules": "[("}, "adapter_config.json"),
        ("adapter_config.json", {"lora_dropout": "much"}, "adapter_config.json"),
        ("adapter_config.json", {"rank_pattern": [1]}, "rank_pattern"),
        ("adapter_config.json", "[" * 100_000, "is not JSON"), ("inlay.json", "[" * 100_000, "is not JSON"),
        ("inlay.json", {"max_length": "x"}, "max_length is 'x'"),
        ("inlay.json", {"fingerprint": 5}, "fingerprint is 5"),
        ("inlay.json", {"template": "{text"}, "template is"), ("inlay.json", {"dtype": 5}, "dtype is 5"),
    ],
)  # fmt: skip
def test_a_folder_of_an_adapter_is_read_with_the_same_care(base_folder, tmp_path, file, edit, said):
    import transformers as tf

    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    bank.add("a", inlay.LoRA(r=2))
    bank.save("a", tmp_path)
    path = tmp_path / file
    if isinstance(edit, str):
        path.write_text(edit)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(FormatError) as refused:
        bank.load("b", tmp_path)
    assert said in str(refused.value) and list(bank.adapters) == ["a"]
