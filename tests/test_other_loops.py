"""Adapters in anybody's own loop: dropout, rates, accelerate; what a loop cannot do is said."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

import inlay
from inlay.batch.noise import Noise
from zoo import make

IDS = torch.tensor([[3, 9, 4, 7, 11], [5, 6, 8, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def shaken(method, name="llama", seed=0):
    """A bank whose adapter "it" has no parameter at zero."""
    bank = inlay.attach(make(name))
    bank.add("it", method, seed=seed)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in bank.adapters["it"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bank


def logits(bank, seed=0):
    torch.manual_seed(seed)
    return bank.model(input_ids=IDS, attention_mask=MASK).logits


DROPPING = {
    "lora": inlay.LoRA(r=4, dropout=0.5),
    "lora on tables": inlay.LoRA(r=4, dropout=0.5, targets=["embed_tokens", "lm_head"]),
    "dora": inlay.DoRA(r=4, dropout=0.5),
    "vera": inlay.VeRA(r=4, dropout=0.5),
    "pfeiffer": inlay.Pfeiffer(dropout=0.5),
    "loreft": inlay.LoReFT(r=2, dropout=0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_acts_in_training_mode_alone(name):
    bank = shaken(DROPPING[name])
    bank.set("it")
    plain = logits(bank)
    bank.model.train()
    first = logits(bank)
    assert torch.equal(first, logits(bank)) and not torch.allclose(first, logits(bank, seed=1))
    assert not torch.allclose(first, plain)
    with torch.no_grad():
        torch.testing.assert_close(logits(bank), plain)
    bank.model.eval()
    torch.testing.assert_close(logits(bank), plain)


def test_dropout_of_some_rows_leaves_the_others_alone():
    bank = shaken(inlay.LoRA(r=4, dropout=0.5))
    bank.model.train()
    with bank.route([None, "it"]):
        mixed = logits(bank)
        again = logits(bank, seed=1)
    with bank.alone():
        base = logits(bank)
    torch.testing.assert_close(mixed[0], base[0])
    assert not torch.allclose(mixed[1], again[1])


def test_noise_of_a_route_takes_the_place_of_torchs_generator():
    bank = shaken(inlay.LoRA(r=4, dropout=0.5))
    noise = Noise([3, 3], [0, 1])
    with bank.route(["it", "it"], noise=noise):
        expected = logits(bank)
        bank.model.train()
        torch.testing.assert_close(logits(bank, seed=7), expected)


def test_gradients_under_dropout_are_those_of_peft():
    theirs = peft.get_peft_model(
        make("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.4)
    ).double()
    bank = shaken(inlay.LoRA(r=4, alpha=8, targets=["q_proj", "down_proj"], dropout=0.4))
    stored = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, own in bank.adapters["it"].params.items():
            for key, parameter in own.items():
                stored[f"base_model.model.{path}.lora_{key}.default.weight"].copy_(parameter)
    for model in (theirs, bank.model):
        model.train()
        torch.manual_seed(2)
        if model is bank.model:
            bank.set("it")
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    for path, own in bank.adapters["it"].params.items():
        for key, parameter in own.items():
            torch.testing.assert_close(
                parameter.grad, stored[f"base_model.model.{path}.lora_{key}.default.weight"].grad
            )


def test_parameter_groups_have_the_rates_of_their_methods():
    bank = shaken([inlay.LoRA(r=4, loraplus_lr_ratio=16), inlay.NormTuning()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = bank.parameter_groups(1e-3, "it", weight_decay=0.1)
        assert len(list(bank.parameters("it"))) == sum(len(group["params"]) for group in groups)
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])
    ups = {id(own["B"]) for own in bank.adapters["it"].params.values() if "B" in own}
    assert {id(p) for p in groups[1]["params"]} == ups
    assert all(group["weight_decay"] == 0.1 for group in torch.optim.AdamW(groups).param_groups)


def test_one_rate_for_lora_plus_is_said_once():
    bank = shaken(inlay.LoRA(r=4, loraplus_lr_ratio=16))
    with pytest.warns(UserWarning, match=r"'it' wants 1, 16 times .* bank\.parameter_groups"):
        list(bank.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(bank.parameters("it"))


def test_virtual_tokens_are_changed_by_nobody_elses_hooks():
    """LoRA on the table, or noise on what it gives, is for a row's own tokens."""
    bank = shaken([inlay.PromptTuning(num_virtual_tokens=2), inlay.LoRA(r=2, targets=["embed_tokens"])])
    adapter, table = bank.adapters["it"], bank.model.model.embed_tokens
    virtual = adapter.parts[0].method.virtual(adapter.parts[0].at("", None, {}))
    own = adapter.parts[1].params["model.embed_tokens"]
    embedded = table.weight[IDS] + own["A"].t()[IDS] @ own["B"].t() * 2
    handle = table.register_forward_hook(lambda module, args, out: out + 1)
    with bank.alone():
        wide = torch.cat([virtual.expand(2, -1, -1), embedded + 1], 1)
        mask = torch.cat([torch.ones(2, 2, dtype=torch.long), MASK], 1)
        expected = bank.model(inputs_embeds=wide, attention_mask=mask).logits[:, 2:]
    bank.set("it")
    found = logits(bank)
    handle.remove()
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_a_module_of_base_and_adapter(precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()  # a loop that was left while it accumulates would keep every optimizer from stepping

    def train(prepared):
        bank = shaken(inlay.LoRA(r=4, loraplus_lr_ratio=4))
        bank.model.float()
        for parameter in bank.adapters["it"].parameters():
            parameter.data = parameter.data.float()
        module = inlay.InlayModule(bank, "it")
        optimizer = torch.optim.AdamW(bank.parameter_groups(1e-2, "it"))
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        if prepared:
            module, optimizer = accelerator.prepare(module, optimizer)
        module.train()
        found = []
        for _ in range(4):
            with accelerator.autocast():
                loss = module(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        return found

    found = train(True)
    assert found == pytest.approx(train(False), rel=1e-5) and found[-1] < found[0]
    with pytest.raises(inlay.errors.UsageError, match="no adapter is called 'x'"):
        inlay.InlayModule(inlay.attach(make("llama")), "x")
