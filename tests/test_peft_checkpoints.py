"""Checkpoints go both ways with the reference package, and broken ones are refused by name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import FormatError, UsageError
from zoo import make

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}

THEIRS = {
    "lora": {
        "llama": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
        "gpt2": peft.LoraConfig(r=4, target_modules=["c_attn", "wte"], use_rslora=True, fan_in_fan_out=True),
        "bert": peft.LoraConfig(r=4, target_modules=r".*layer\.1\..*(query|value)"),
    },
    "ia3": {
        "llama": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "bert": peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    },
    "norm": {
        "llama": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        "gpt2": peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]),
    },
}
CASES = [(method, name) for method, bases in THEIRS.items() for name in bases]


def randomise(parameters):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_theirs_loads_here_and_ours_loads_there(method, name, tmp_path):
    reference = peft.get_peft_model(make(name), THEIRS[method][name])
    randomise(p for p in reference.parameters() if p.requires_grad)
    reference.save_pretrained(tmp_path / "theirs")
    expected = reference.eval()(input_ids=IDS).logits
    bank = inlay.attach(make(name))
    plain = bank.model(input_ids=IDS).logits
    bank.load("a", tmp_path / "theirs")
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, **EXACT)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **EXACT)


@pytest.fixture
def saved(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.LoRA(r=4, targets=["q_proj"]), seed=1)
    bank.save("a", tmp_path / "a")
    return tmp_path / "a"


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def drop(tensors):
    del tensors[KEY]


def drop_module(tensors):
    for key in [k for k in tensors if "layers.0" in k]:
        del tensors[key]


def poison(tensors):
    tensors[KEY][0, 0] = float("nan")


def widen(tensors):
    tensors[KEY] = torch.zeros(4, 17, dtype=torch.float64)


def stray(tensors):
    tensors[KEY.replace("lora_A", "lora_C")] = torch.zeros(1)


def stranger(tensors):
    tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("edit", "said"),
    [(drop, "lacks"), (drop_module, "holds no tensor"), (poison, "NaN"), (widen, "17"), (stray, "no use"),
     (stranger, "elsewhere")],
)  # fmt: skip
def test_a_broken_checkpoint_is_refused_by_name(saved, edit, said):
    change(saved, edit)
    bank = inlay.attach(make("llama"))
    with pytest.raises(FormatError, match=said):
        bank.load("a", saved)
    assert not bank.adapters


def test_a_pickle_is_never_opened(saved):
    (saved / "adapter_model.safetensors").unlink()
    torch.save({"x": ValueError}, saved / "adapter_model.bin")
    with pytest.raises(FormatError, match="never opened"):
        inlay.attach(make("llama")).load("a", saved)


def test_a_torch_file_of_tensors_loads(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    inlay.attach(make("llama")).load("a", saved)


def test_settings_that_have_no_equivalent_are_refused(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    with pytest.raises(FormatError, match="use_qalora"):
        inlay.attach(make("llama")).load("a", saved)


def test_a_folder_without_an_adapter_and_an_unknown_format(tmp_path):
    bank = inlay.attach(make("llama"))
    with pytest.raises(UsageError, match="adapter_config"):
        bank.load("a", tmp_path)
    bank.add("a", inlay.LoRA())
    with pytest.raises(UsageError, match="gguf"):
        bank.save("a", tmp_path, format="gguf")
