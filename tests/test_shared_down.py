"""Layers that read one x take their down products from one computation, in training, and are what they are alone."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.bank import sharing
from inlay.batch.forward import FORWARD
from inlay.kernels import low_rank as kernel
from inlay.kernels import shared_down as shared
from inlay.kernels.low_rank import Product, low_rank
from inlay.kernels.shared_down import Joint, shared_down
from zoo import make

EXACT = {"rtol": 0, "atol": 1e-10}
IN, OUTS = 12, (10, 6, 7)
SPANS = [((0, 5),), ((5, 10),), ((10, 13), (20, 22)), ((13, 20),), ((24, 30),)]  # tokens 22 and 23 are nobody's
RANKS = [(3, 3, 3), (3, 0, 8), (8, 8, 0), (17, 2, 1), (0, 0, 5)]


def made():
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    factors = [[(rand(r, IN), rand(out, r)) if r else None for r, out in zip(own, OUTS, strict=True)] for own in RANKS]
    return rand(30, IN), factors


def at_layer(x, factors, layer, low=None):
    products = [
        Product(spans, 0.5 + n, None if low is not None else own[layer][0], own[layer][1])
        for n, (spans, own) in enumerate(zip(SPANS, factors, strict=True)) if own[layer]
    ]  # fmt: skip
    return low_rank(x, torch.zeros(30, OUTS[layer], dtype=torch.float64), products, low=low)


def together(x, factors):
    joints = [
        Joint(spans, tuple(None if pair is None else pair[0] for pair in own))
        for spans, own in zip(SPANS, factors, strict=True)
    ]
    lows = shared_down(x, joints)
    return [at_layer(x, factors, layer, low) for layer, low in enumerate(lows)]


@pytest.fixture(params=[False, True], ids=["one by one", "padded"])
def padded(request, monkeypatch):
    monkeypatch.setattr(kernel, "pads", lambda x, shapes: request.param)
    monkeypatch.setattr(shared, "pads", lambda x, shapes: request.param)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)], ids=["all used", "one used"])
def test_values_and_gradients_are_those_of_each_layer_alone(padded, layers):
    x, factors = made()
    leaves = [x, *(t for own in factors for pair in own if pair for t in pair)]
    found = []
    for outs in ([at_layer(x, factors, n) for n in range(3)], together(x, factors)):
        torch.manual_seed(1)
        loss = sum((outs[n] * torch.randn_like(outs[n])).sum() for n in layers)
        found.append([loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_neighbour_that_is_no_number_changes_nothing(padded):
    x, factors = made()
    expected = together(x, factors)
    own = [*factors[0][0], x]
    wanted = torch.autograd.grad(sum(out[:5].sum() for out in expected), own)
    with torch.no_grad():
        x[13:20] = float("nan")
        factors[3][0][0].fill_(float("inf"))
    ours = together(x, factors)
    for new, old in zip(ours, expected, strict=True):
        torch.testing.assert_close(new[:13], old[:13], **EXACT)
    found = torch.autograd.grad(sum(out[:5].sum() for out in ours), own)
    torch.testing.assert_close(found[0], wanted[0], **EXACT)
    torch.testing.assert_close(found[2][:13], wanted[2][:13], **EXACT)


def gradients(model, bank, routes, checkpointed):
    ids = torch.arange(3, 51).remainder(40).view(4, 12)
    bank.model.zero_grad()
    with bank.route(routes):
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward(retain_graph=not checkpointed)
        if not checkpointed:
            bank.model.zero_grad()
            for parameter in bank.parameters():
                parameter.grad = None
            logits.square().mean().backward()
    found = {
        (name, path, key): p.grad.clone()
        for name in ("a", "b", "c") for path, own in bank.adapters[name].params.items() for key, p in own.items()
        if p.grad is not None
    }  # fmt: skip
    for parameter in bank.parameters():
        parameter.grad = None
    return logits.detach(), found


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_computes_them_once_and_the_same(monkeypatch, checkpointed):
    """Of adapters at different ranks and at some of the layers, in a model; also where the backward runs twice."""
    model = make("llama").double()
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=4, targets=["q_proj", "v_proj", "gate_proj"]), seed=0)
    bank.add("b", inlay.LoRA(r=3), seed=1)
    bank.add("c", inlay.DoRA(r=2, targets=["q_proj", "k_proj", "v_proj"]), seed=2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    routes = ["a", "b", None, "c"]
    calls = []
    whole = sharing.shared_down
    monkeypatch.setattr(sharing, "shared_down", lambda x, joints: calls.append(len(joints)) or whole(x, joints))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ours = gradients(model, bank, routes, checkpointed)
    layers = model.config.num_hidden_layers
    assert sorted(calls) == sorted([3, 2] * layers * (1 + checkpointed))
    monkeypatch.setattr("inlay.bank.applying.shared_low", lambda *args: None)
    alone = gradients(model, bank, routes, checkpointed)
    torch.testing.assert_close(ours[0], alone[0], **EXACT)
    assert ours[1].keys() == alone[1].keys() and len(ours[1]) > 20
    for key, value in alone[1].items():
        torch.testing.assert_close(ours[1][key], value, **EXACT)


def test_no_block_leaves_its_input_behind():
    """Where an adapter acts at some of the layers that read one x, what they share is gone behind the last of them."""
    model = make("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2, targets=["q_proj", "v_proj", "gate_proj"]), seed=0)
    held = []
    model.model.norm.register_forward_pre_hook(lambda module, args: held.append(dict(FORWARD.get().inputs)))
    with bank.route(["a"]):
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert held == [{}]
