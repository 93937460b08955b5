"""Fused modules give what the base's own give, and are used only while gradients are taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.bank.applying import SiteHooks
from inlay.kernels.fused import fused_modules
from inlay.kernels.gate import fused_gate
from inlay.kernels.norm import fused_norm
from inlay.kernels.recomputed import Recomputed
from inlay.methods.table import METHODS
from zoo import make

IDS = torch.arange(3, 15)[None]


def frozen(name):
    return make(name, dtype=torch.float32).requires_grad_(False)


def kinds(model):
    return {type(module).__name__ for module in fused_modules(model)}


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
    assert not fused_modules(model)


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


def calls_of(module, monkeypatch):
    """Counts how often a module's own class computes it."""
    seen, own = [], type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, x: seen.append(self) or own(self, x))
    return seen


def test_they_are_used_in_training_under_a_route_alone(monkeypatch):
    model = frozen("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=0)
    own = calls_of(model.model.norm, monkeypatch)
    with bank.route(["a"]):
        model(input_ids=IDS)  # the first forward tries them
        own.clear()
        model(input_ids=IDS)
        assert not own
        with torch.no_grad():
            model(input_ids=IDS)
        assert own
    own.clear()
    model(input_ids=IDS)
    assert own
    bank.detach()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_call_that_breaks_off_leaves_the_next_one_whole():
    model = frozen("llama")
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=0)
    with bank.route(["a"]), pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    with bank.route(["a"]):
        model(input_ids=IDS)
    bank.detach()
    assert not any("forward" in vars(module) for module in model.modules())


def gradients(bank, rows):
    with bank.route(rows):
        loss = bank.model(input_ids=IDS).logits.square().sum()
    return torch.autograd.grad(loss, list(bank.parameters()))


def trained(name, **settings):
    bank = inlay.attach(make(name))
    bank.add("a", inlay.LoRA(r=2, **settings), seed=0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return bank


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "qwen3_moe"])
def test_an_adapter_that_takes_the_bases_product_along_has_the_same_gradients(name, monkeypatch):
    bank, taken = trained(name), []
    asked = SiteHooks._rides_along

    def counted(*args):
        taken.append(asked(*args))
        return taken[-1]

    monkeypatch.setattr(SiteHooks, "_rides_along", counted)
    ours = gradients(bank, ["a"])
    assert any(taken) == (name != "gpt2")  # whose projections are no linear layers
    monkeypatch.setattr(SiteHooks, "_rides_along", lambda *args: False)
    for own, expected in zip(ours, gradients(bank, ["a"]), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_adapters_that_are_computed_together_take_it_along_too(monkeypatch):
    bank = trained("llama")
    bank.add("b", inlay.LoRA(r=2), seed=1)
    bank.add("c", inlay.LoRA(r=3), seed=1)
    asked = SiteHooks._rides_along
    uneven, even, other = [("a", 3), ("b", 5), ("b", 4)], [("a", 6), ("b", 6)], [("a", 6), ("c", 6)]
    for segments in (uneven, even, other):
        made, taken = [], []
        for kind in (lambda *args, seen=taken: seen.append(asked(*args)) or seen[-1], lambda *args: False):
            monkeypatch.setattr(SiteHooks, "_rides_along", kind)
            with bank.stream(segments):
                loss = bank.model(input_ids=IDS).logits.square().sum()
            made.append(torch.autograd.grad(loss, list(bank.parameters()), allow_unused=True))
        assert any(taken)
        for own, expected in zip(*made, strict=True):
            assert (own is None) == (expected is None)
            if own is not None:
                torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_that_somebody_watches_keeps_its_own_backward():
    bank, seen = trained("llama"), []
    expected = gradients(bank, ["a"])
    watched = bank.model.model.layers[1].self_attn.o_proj
    watched.register_full_backward_hook(lambda module, given, got: seen.append(given[0].abs().sum()))
    for own, other in zip(gradients(bank, ["a"]), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    assert len(seen) == 1 and seen[0] > 0


def test_what_can_be_made_again_is_not_kept_unless_somebody_wrote_into_it():
    def sources(bank):
        with bank.route(["a"]):
            out = bank.model(input_ids=IDS).logits
        found, todo = [], [out.grad_fn]
        while todo:
            node = todo.pop()
            found += [node.recomputed] if hasattr(node, "sources") else []
            todo += [inner for inner, _ in node.next_functions if inner is not None]
        return found

    bank = trained("llama", targets=["down_proj"])
    kept = sources(bank)
    assert kept and all(isinstance(found, Recomputed) for found in kept)
    bank.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(1),))
    assert None in sources(bank)


@pytest.mark.parametrize("method", [inlay.LoRA(r=2), inlay.IA3(), METHODS["houlsby"]()], ids=["lora", "ia3", "houlsby"])
@pytest.mark.parametrize("rows", [["a"], ["a", "b"]], ids=["one", "two"])
def test_autocast_gives_nearly_the_same_gradients(method, rows):
    bank = inlay.attach(make("llama", dtype=torch.float32))
    for seed, name in enumerate("ab"):
        bank.add(name, method, seed=seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), bank.route(rows):
            loss = bank.model(input_ids=IDS.expand(len(rows), -1)).logits.float().square().sum()
        grads = torch.autograd.grad(loss, [p for name in rows for p in bank.parameters(name)])
        made.append(torch.cat([grad.flatten() for grad in grads]))
    assert (made[0] - made[1]).norm() < 0.05 * made[0].norm()
