"""loralib's state dicts go both ways; its own modules give the logits to hold to."""

from __future__ import annotations

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.errors import FormatError, UsageError
from zoo import make

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-10}
Q_AND_V = [True, False, True]


def linear(old: nn.Linear) -> loralib.Linear:
    new = loralib.Linear(old.in_features, old.out_features, r=3, lora_alpha=5, bias=old.bias is not None)
    return filled(new, old)


def merged(old: nn.Module) -> loralib.MergedLinear:
    new = loralib.MergedLinear(old.in_features, old.out_features, r=3, lora_alpha=5, enable_lora=Q_AND_V, bias=False)
    return filled(new, old)


def filled(new, old):
    new.weight.data = old.weight.data.clone()
    if old.bias is not None:
        new.bias.data = old.bias.data.clone()
    new = new.double()
    nn.init.normal_(new.lora_A)
    nn.init.normal_(new.lora_B)
    new.eval()  # merges on the way, and returns nothing
    return new


def theirs(name):
    torch.manual_seed(0)
    model = make(name)
    torch.manual_seed(4)
    for block in model.model.layers:
        if name == "phi3":
            old = block.self_attn.qkv_proj
            block.self_attn.qkv_proj = merged(old)
        else:
            block.self_attn.q_proj = linear(block.self_attn.q_proj)
            block.mlp.down_proj = linear(block.mlp.down_proj)
    return model


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_theirs_loads_here_and_ours_loads_there(name, kind, tmp_path, monkeypatch):
    if name == "phi3":  # parts of equal width, which is all that loralib knows
        import transformers as tf

        import zoo

        config = tf.Phi3Config(**zoo.small("num_key_value_heads", num_key_value_heads=4))
        monkeypatch.setitem(zoo.ZOO, "phi3", lambda: tf.Phi3ForCausalLM(config))
    reference = theirs(name)
    expected = reference(input_ids=IDS).logits
    file = tmp_path / f"lora{kind}"
    state = {k: v.clone() for k, v in loralib.lora_state_dict(reference).items()}
    torch.save(state, file) if kind == ".pt" else save_file(state, file)
    enabled = Q_AND_V if name == "phi3" else None
    bank = inlay.attach(make(name))
    bank.load("a", file, alpha=5, enabled=enabled)
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(ours, expected, **EXACT)
    bank.save("a", tmp_path / "ours.safetensors", format="loralib", enabled=enabled)
    again = load_file(tmp_path / "ours.safetensors")
    assert again.keys() == state.keys()
    for key, value in again.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.fixture
def file(tmp_path):
    save_file(loralib.lora_state_dict(theirs("llama")), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


KEY = "model.layers.0.self_attn.q_proj.lora_A"


def test_what_the_file_lacks_must_be_said(file):
    bank = inlay.attach(make("llama"))
    with pytest.raises(UsageError, match="alpha"):
        bank.load("a", file)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(KEY), "lacks 'model.layers.0.self_attn.q_proj.lora_A'"),
        (lambda t: t.update({"elsewhere.lora_A": torch.zeros(1)}), "elsewhere"),
        (lambda t: t.update({KEY: torch.zeros(3, 9)}), "do not fit"),
        (lambda t: t.clear(), "holds no lora_A"),
    ],
)
def test_broken_files_are_refused_by_name(file, edit, said):
    change(file, edit)
    with pytest.raises(FormatError, match=said):
        inlay.attach(make("llama")).load("a", file, alpha=1)


def test_only_lora_can_be_written(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.IA3())
    with pytest.raises(UsageError, match="loralib has no"):
        bank.save("a", tmp_path / "x.pt", format="loralib")
