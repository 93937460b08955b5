"""Fused modules give what the base's own give, and are in place only while gradients are taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.fused.gate import fused_gate
from inlay.fused.norm import fused_norm
from inlay.fused.twins import find_twins, in_place
from zoo import make

IDS = torch.arange(3, 15)[None]


def frozen(name):
    return make(name, dtype=torch.float32).requires_grad_(False)


def kinds(model):
    return {type(module).__name__ for module in find_twins(model)}


def test_norms_and_gates_of_llama_are_found_and_those_of_others_left_alone():
    assert kinds(frozen("llama")) == {"LlamaRMSNorm", "LlamaMLP"}
    assert not kinds(frozen("gpt2"))
    assert "Gemma3MLP" not in kinds(frozen("gemma3"))  # its activation is another


def test_a_module_that_only_looks_alike_keeps_its_own_forward():
    class Louder(nn.Module):
        variance_epsilon = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 1.01

    model = nn.Sequential(Louder()).requires_grad_(False)
    assert fused_norm(model[0]) is not None
    assert not find_twins(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_values_and_gradients_are_the_modules_own(kind, dtype):
    model = frozen("llama").to(dtype)
    module = model.model.norm if kind == "norm" else model.model.layers[0].mlp
    if kind == "norm":
        nn.init.normal_(module.weight)
    twin = (fused_norm if kind == "norm" else fused_gate)(module)
    x = torch.randn(2, 5, 16).to(dtype)
    found = []
    for forward in (module.forward, twin):
        given = x.clone().requires_grad_()
        out = forward(given)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
        found.append((out.detach(), given.grad))
    noise = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for own, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=noise, atol=noise)


def test_they_are_in_place_in_training_alone_and_for_one_call():
    model = frozen("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=0)
    seen = []
    model.model.norm.register_forward_hook(lambda module, *_: seen.append("forward" in vars(module)))
    with bank.route(["a"]):
        model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
    model(input_ids=IDS)
    assert seen == [True, False, False]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_nested_use_leaves_the_outer_one_in_place():
    model = frozen("llama")
    twins = find_twins(model)
    with in_place(twins):
        with in_place(twins):
            pass
        assert all("forward" in vars(module) for module in twins)
    assert not any("forward" in vars(module) for module in twins)


def test_a_call_that_breaks_off_leaves_the_next_one_whole():
    model = frozen("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=0)
    with bank.route(["a"]), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    with bank.route(["a"]):
        model(input_ids=IDS)
    assert not any("forward" in vars(module) for module in model.modules())
