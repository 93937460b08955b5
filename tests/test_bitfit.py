"""BitFit against a plain torch model of which only the biases are trained."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch

import inlay
from inlay.errors import FormatError, UsageError
from zoo import make

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}


def loss_of(model):
    logits = model(input_ids=IDS).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flip(1).flatten())


def logits(bank, row):
    with bank.route([row] * len(IDS)):
        return bank.model(input_ids=IDS).logits


def run(model, parameters, steps=8):
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "bloom", "bert", "roberta"])
def test_it_trains_as_a_model_of_which_only_biases_are_trained(name):
    """Losses and gradients, step by step, and the biases behind them; a merge then makes the very same model."""
    plain = make(name).requires_grad_(False)
    biases = {key: p.requires_grad_() for key, p in plain.named_parameters() if key.endswith("bias")}
    bank = inlay.attach(make(name))
    adapter = bank.add("a", inlay.BitFit(), seed=1)
    assert len(adapter) == sum(p.numel() for p in biases.values())
    torch.testing.assert_close(logits(bank, "a"), logits(bank, None), rtol=0, atol=0)
    bank.set("a")
    loss_of(plain).backward()
    loss_of(bank.model).backward()
    own = {path: p["bias"] for path, p in adapter.params.items()}
    modules = dict(plain.named_modules())
    for path, value in own.items():
        expected = modules[path].bias.grad
        torch.testing.assert_close(value.grad, expected, rtol=0, atol=1e-9 * max(1, float(expected.abs().max())))
    ours, theirs = run(bank.model, list(adapter.parameters())), run(plain, list(biases.values()))
    assert ours[0] - ours[-1] > 0.05
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-7)
    bank.set(None)
    bank.merge("a")
    for path, site in adapter.sites.items():
        torch.testing.assert_close(site.module.bias.detach(), modules[path].bias.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-6)


def randomised(bank, name):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_it_is_saved_and_read_again(name, tmp_path):
    bank = inlay.attach(make(name))
    bank.add("a", inlay.BitFit(add_bias=name == "llama"), seed=1)
    randomised(bank, "a")
    bank.save("a", tmp_path / "a")
    again = inlay.attach(make(name))
    adapter = again.load("a", tmp_path / "a")
    assert isinstance(adapter.method, inlay.BitFit)
    torch.testing.assert_close(logits(again, "a"), logits(bank, "a"), rtol=0, atol=0)
    assert (logits(bank, "a") - logits(bank, None)).abs().max() > 1e-3


def test_a_base_without_biases_says_so():
    bank = inlay.attach(make("llama"))
    with pytest.raises(UsageError, match="add_bias"):
        bank.add("a", inlay.BitFit())
    with pytest.raises(UsageError, match="add_bias"):
        bank.add("a", inlay.BitFit(targets="attention"))
    adapter = bank.add("a", inlay.BitFit(add_bias=True), seed=1)
    assert len(adapter.sites) == 14 and not any(p.any() for p in adapter.parameters())
    randomised(bank, "a")
    expected = make("llama").requires_grad_(False)
    for path, own in adapter.params.items():
        expected.get_submodule(path).bias = torch.nn.Parameter(own["bias"].detach())
    torch.testing.assert_close(logits(bank, "a"), expected(input_ids=IDS).logits, **EXACT)
    with pytest.raises(UsageError, match="no bias"):
        bank.merge("a")


def test_targets_and_layers():
    bank = inlay.attach(make("gpt2"))
    paths = [*bank.add("a", inlay.BitFit(targets=["c_attn", "ln_1"], layers=[1])).sites]
    assert paths == ["transformer.h.1.attn.c_attn", "transformer.h.1.ln_1"]
    assert len(bank.add("b", inlay.BitFit(targets="mlp")).sites) == 4
    with pytest.raises(UsageError, match="c_atn"):
        bank.add("c", inlay.BitFit(targets=["c_atn"]))
    with pytest.raises(UsageError, match="layers"):
        bank.add("c", inlay.BitFit(targets=["ln_f"], layers=[0]))


def test_it_meets_others_at_a_norm_and_at_a_layer():
    """Beside LoRA and norm tuning, as parts and in a chain: what it adds is its difference to the base's bias."""
    bank = inlay.attach(make("gpt2"))
    target = "ln_f"
    bank.add("bias", inlay.BitFit(targets=[target]), seed=1)
    bank.add("norm", inlay.NormTuning(targets=[target]), seed=1)
    bank.add("parts", [inlay.NormTuning(targets=[target]), inlay.BitFit(targets=[target])], seed=1)
    randomised(bank, "bias")
    randomised(bank, "norm")
    with torch.no_grad():
        for own, other in zip(bank.adapters["parts"].parts, ("norm", "bias"), strict=True):
            for path, params in own.params.items():
                for key, value in params.items():
                    value.copy_(bank.adapters[other].params[path][key])
    path = "transformer.ln_f"
    difference = bank.adapters["bias"].params[path]["bias"] - bank.model.transformer.ln_f.bias
    moved = difference @ bank.model.lm_head.weight.T
    base = logits(bank, None)
    torch.testing.assert_close(logits(bank, "bias"), base + moved, **EXACT)
    torch.testing.assert_close(logits(bank, {"bias": 0.5}), base + 0.5 * moved, **EXACT)
    torch.testing.assert_close(logits(bank, ["norm", "bias"]), logits(bank, "norm") + moved, **EXACT)
    torch.testing.assert_close(logits(bank, "parts"), logits(bank, ["norm", "bias"]), **EXACT)


LORA = {
    "gpt2": peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "bert": peft.LoraConfig(r=4, target_modules=["query", "dense"], use_dora=True),  # its head's bias has two names
    "opt": peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"]),
}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", list(LORA))
def test_the_biases_of_a_reference_checkpoint_are_a_part_of_their_own(name, bias, tmp_path):
    config = copy.deepcopy(LORA[name])
    config.bias = bias
    theirs = peft.get_peft_model(make(name), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=IDS).logits
    bank = inlay.attach(make(name))
    parts = bank.load("a", tmp_path / "theirs").parts
    assert [type(part.method) for part in parts] == [inlay.DoRA if name == "bert" else inlay.LoRA, inlay.BitFit]
    assert (bias == "lora_only") == (parts[0].sites.keys() == parts[1].sites.keys())
    torch.testing.assert_close(logits(bank, "a"), expected, **EXACT)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, **EXACT)
    again = inlay.attach(make(name))
    again.load("a", tmp_path / "ours")
    torch.testing.assert_close(logits(again, "a"), expected, **EXACT)


def test_biases_beside_lora_are_saved_and_what_the_reference_cannot_say_too(tmp_path):
    for name, added in (("gpt2", False), ("llama", True)):
        bank = inlay.attach(make(name))
        bank.add("a", [inlay.LoRA(r=2), inlay.BitFit(add_bias=added)], seed=1)
        randomised(bank, "a")
        with pytest.raises(UsageError, match="2 parts"):
            bank.save("a", tmp_path / "x.safetensors", format="loralib")
        bank.save("a", tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config.get("bias") == (None if added else "all")
        again = inlay.attach(make(name))
        again.load("a", tmp_path / name)
        torch.testing.assert_close(logits(again, "a"), logits(bank, "a"), rtol=0, atol=0)
        if not added:
            back = peft.PeftModel.from_pretrained(make(name), tmp_path / name).eval()
            torch.testing.assert_close(back(input_ids=IDS).logits, logits(bank, "a"), **EXACT)


def test_a_checkpoint_that_lacks_its_biases_is_refused(tmp_path):
    bank = inlay.attach(make("gpt2"))
    bank.add("a", inlay.LoRA(r=2), seed=1)
    bank.save("a", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "all"}))
    with pytest.raises(FormatError, match="bias"):
        inlay.attach(make("gpt2")).load("a", tmp_path)
