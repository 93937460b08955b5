"""VeRA against HF PEFT 0.21.2: the frozen matrices as the reference draws them, stored or not, and one copy of them."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from curves import adamw_losses
from inlay.errors import FormatError, UsageError
from zoo import make

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}
FILE = "adapter_model.safetensors"
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"]}


def reference(name, **more):
    settings = {"r": 6, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2", **more}
    model = peft.get_peft_model(make(name), peft.VeraConfig(**settings)).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    return model


def randomise(parameters, by=0.3):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


def logits(bank, row):
    with bank.route([row] * len(IDS)):
        return bank.model(input_ids=IDS).logits


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", list(TARGETS))
def test_checkpoints_go_both_ways(name, stored, tmp_path):
    theirs = reference(name, save_projection=stored, projection_prng_key=7, d_initial=0.4)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=IDS).logits
    bank = inlay.attach(make(name))
    bank.load("a", tmp_path / "theirs")
    ours = logits(bank, "a")
    assert (ours - logits(bank, None)).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, **EXACT)
    bank.save("a", tmp_path / "ours")
    assert load_file(tmp_path / "ours" / FILE).keys() == load_file(tmp_path / "theirs" / FILE).keys()
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **EXACT)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, ours, **EXACT)
    merged = theirs.merge_and_unload().state_dict()
    for key, value in bank.model.state_dict().items():
        torch.testing.assert_close(value, merged[key], **EXACT)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_fresh_adapter_trains_as_the_reference(name):
    """A fresh one has the reference's own start, so that no checkpoint is needed between them."""
    settings = {"r": 6, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    theirs = peft.get_peft_model(make(name), peft.VeraConfig(**settings, vera_dropout=0.0)).eval()
    bank = inlay.attach(make(name))
    adapter = bank.add("a", inlay.VeRA(r=6, targets=TARGETS[name]), seed=1)
    torch.testing.assert_close(logits(bank, "a"), logits(bank, None), rtol=0, atol=0)
    bank.set("a")
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == len(adapter)
    pairs = ((bank.model, list(adapter.parameters())), (theirs, trained))
    losses = [adamw_losses(model, parameters, IDS, lr=0.05, steps=10) for model, parameters in pairs]
    assert losses[0][0] - losses[0][-1] > 0.05
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-7)


def copies(bank):
    return {name: adapter.parts[0].constants["A"].data_ptr() for name, adapter in bank.adapters.items()}


def test_equal_matrices_are_held_once(tmp_path):
    bank = inlay.attach(make("llama"))
    for name, key in (("a", 0), ("b", 0), ("other", 1)):
        bank.add(name, inlay.VeRA(r=6, projection_prng_key=key), seed=1)
    bank.add("few", inlay.VeRA(r=6, layers=[0]), seed=1)  # the same sizes in fewer places
    bank.save("a", tmp_path / "same")
    bank.load("same", tmp_path / "same")
    bank.save("a", tmp_path / "own")
    tensors = load_file(tmp_path / "own" / FILE)
    tensors["base_model.vera_A"] += 1
    save_file(tensors, tmp_path / "own" / FILE)
    bank.load("own", tmp_path / "own")
    found = copies(bank)
    assert found["a"] == found["b"] == found["few"] == found["same"]
    assert len({found["a"], found["other"], found["own"]}) == 3
    randomise(bank.parameters("own"))
    alone = inlay.attach(make("llama"))
    bank.save("own", tmp_path / "again")
    torch.testing.assert_close(load_file(tmp_path / "again" / FILE)["base_model.vera_A"], tensors["base_model.vera_A"])
    alone.load("x", tmp_path / "again")
    torch.testing.assert_close(logits(alone, "x"), logits(bank, "own"), rtol=0, atol=0)
    bank.save("own", tmp_path / "own.safetensors", format="loralib")
    bank.load("product", tmp_path / "own.safetensors", alpha=6)
    torch.testing.assert_close(logits(bank, "product"), logits(bank, "own"), **EXACT)
    bank.remove("a")
    torch.testing.assert_close(logits(bank, "b"), logits(bank, None), rtol=0, atol=0)


def test_the_matrices_are_not_trained_and_not_counted(tmp_path):
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.VeRA(r=6, targets=["q_proj"]), seed=1)
    assert len(adapter) == 2 * (6 + 16)
    bank.save("a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    del tensors["base_model.vera_B"]
    save_file(tensors, tmp_path / "a" / FILE)
    with pytest.raises(FormatError, match="vera_B"):
        inlay.attach(make("llama")).load("a", tmp_path / "a")


def test_a_table_has_no_vera():
    with pytest.raises(UsageError, match="embed_tokens"):
        inlay.attach(make("llama")).add("a", inlay.VeRA(targets=["embed_tokens"]))
