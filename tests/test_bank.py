"""The laws of a mixed batch at the projection and norm sites, and parity with the reference package."""

from __future__ import annotations

import peft
import pytest
import torch

import inlay
from inlay.errors import UsageError
from zoo import ZOO, make

TEXT = [name for name in ZOO if name not in ("vit", "t5")]
EXACT = {"rtol": 0, "atol": 1e-10}


def inputs(name, rows=4):
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64)}
    ids = torch.randint(3, 48, (rows, 6))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if name == "t5" else {"input_ids": ids}


def take(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def randomise(bank):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def mixed(name):
    """A base with one adapter of each method that applies, and a route of four different rows."""
    model = make(name)
    bank = inlay.attach(model)
    bank.add("small", inlay.LoRA(r=4))
    bank.add("wide", inlay.LoRA(r=32, targets="all-linear", layers=[0], use_rslora=True))
    bank.add("norm", inlay.NormTuning())
    route = ["small", None, "norm", "wide"]
    if name != "mamba":
        bank.add("ia3", inlay.IA3())
        route[2] = ["ia3", "norm"]
    randomise(bank)
    return model, bank, route


@pytest.mark.parametrize("name", list(ZOO))
def test_the_base_is_untouched(name):
    model, batch = make(name), inputs(name)
    keys = list(model.state_dict())
    model.requires_grad_(False)  # a trained attention bias makes torch choose another kernel
    before = model(**batch).logits
    model.requires_grad_(True)
    bank = inlay.attach(model)
    assert torch.equal(model(**batch).logits, before)
    bank.add("a", inlay.LoRA())
    randomise(bank)
    assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == keys
    bank.set("a")
    assert not torch.equal(model(**batch).logits, before)
    bank.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.requires_grad_(False)(**batch).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", list(ZOO))
def test_a_row_never_sees_its_neighbours(name):
    model, bank, route = mixed(name)
    batch, parameters = inputs(name), list(bank.parameters())
    with bank.route(route):
        together = model(**batch).logits
    summed = torch.autograd.grad(together.square().sum(), parameters, allow_unused=True)
    totals = [torch.zeros_like(p) for p in parameters]
    for row, entry in enumerate(route):
        with bank.route([entry]):
            alone = model(**take(batch, [row])).logits
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)
        if entry is not None:
            grads = torch.autograd.grad(alone.square().sum(), parameters, allow_unused=True)
            for total, grad in zip(totals, grads, strict=True):
                total += 0 if grad is None else grad
    for grad, total in zip(summed, totals, strict=True):
        torch.testing.assert_close(torch.zeros_like(total) if grad is None else grad, total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_diverged_neighbour_poisons_nobody(name):
    model, bank, route = mixed(name)
    batch = inputs(name)
    with bank.route(route):
        healthy = model(**batch).logits
    with torch.no_grad():
        for parameter in bank.parameters("small"):
            parameter.fill_(float("nan"))
    with bank.route(route):
        sick = model(**batch).logits
    assert sick[0].isnan().any()
    torch.testing.assert_close(sick[1:], healthy[1:], **EXACT)
    healthy_parameters = list(bank.parameters("wide"))
    grads = torch.autograd.grad(sick.sum(), healthy_parameters, allow_unused=True)
    assert not any(g is not None and g.isnan().any() for g in grads)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bert"])
@pytest.mark.parametrize("method", ["small", "ia3", "norm"])
def test_merged_equals_unmerged(name, method):
    model, bank, _ = mixed(name)
    bank.set(method)
    unmerged = model(**inputs(name)).logits
    bank.set(None)
    bank.merge(method)
    torch.testing.assert_close(model(**inputs(name)).logits, unmerged, **EXACT)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "opt", "bloom", "bert"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_has_the_reference_logits_and_gradients(name, rslora):
    bank = inlay.attach(make(name))
    adapter = bank.add("a", inlay.LoRA(r=4, alpha=6, use_rslora=rslora))
    randomise(bank)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=list(adapter.sites))
    reference = peft.get_peft_model(make(name), config)
    theirs = dict(reference.named_parameters())
    pairs = []
    for path, params in adapter.params.items():
        for key, value in params.items():
            other = theirs[f"base_model.model.{path}.lora_{key}.default.weight"]
            other.data = value.data.clone()
            pairs.append((value, other))
    bank.set("a")
    ours, expected = bank.model(**inputs(name)).logits, reference(**inputs(name)).logits
    torch.testing.assert_close(ours, expected, **EXACT)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for value, other in pairs:
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_stacked_and_weighted_rows():
    model, bank, _ = mixed("llama")
    batch = inputs("llama", 3)
    with bank.route([{"small": 0.5}, {"small": 1.0, "wide": 0.0}, ["small"]]):
        half, one, listed = model(**batch).logits
    for row, logits in ((1, one), (2, listed)):
        with bank.route(["small"]):
            torch.testing.assert_close(model(**take(batch, [row])).logits[0], logits, **EXACT)
    with torch.no_grad():
        for params in bank.adapters["small"].params.values():
            params["B"].mul_(0.5)
    with bank.route(["small"]):
        torch.testing.assert_close(model(**take(batch, [0])).logits[0], half, **EXACT)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_each_row_alone(beams):
    model, bank, route = mixed("llama")
    batch = inputs("llama")
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with bank.route(route):
        together = model.generate(**batch, **settings)
    for row, entry in enumerate(route):
        with bank.route([entry]):
            alone = model.generate(**take(batch, [row]), **settings)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_lora_on_an_embedding_merges():
    model = make("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=3, targets=["embed_tokens", "q_proj"]))
    randomise(bank)
    bank.set("a")
    unmerged = model(**inputs("llama")).logits
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(model(**inputs("llama")).logits, unmerged, **EXACT)


def test_wrong_use_is_named():
    model = make("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA())
    with pytest.raises(UsageError, match="'b'"), bank.route(["b"]):
        pass
    with pytest.raises(UsageError, match="already"):
        bank.add("a", inlay.LoRA())
    with pytest.raises(UsageError, match="r is 0"):
        inlay.LoRA(r=0)
    with pytest.raises(UsageError, match="4 rows"), bank.route(["a"] * 4):
        model(input_ids=torch.ones(3, 5, dtype=torch.long))
