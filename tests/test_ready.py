"""Steps of the decoder call single modules without their hooks: nobody who looks on may miss anything."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251

import pytest
import torch

import inlay
from inlay.bank.hooks import Hook
from inlay.runtime.decode import Decoder
from zoo import make


@pytest.fixture
def bank():
    bank = inlay.attach(make("llama"))
    bank.add("lora", inlay.LoRA(r=2), seed=1)
    bank.add("ia3", inlay.IA3(), seed=2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    yield bank
    bank.detach()


def running(bank, rows=("lora", "ia3", None)):
    decoder = Decoder(bank, 2**22)
    for row in rows:
        decoder.add(row, [6, 7, 8], 20)
    return decoder


def step(decoder):
    rows, logits = decoder.step()
    assert logits is not None
    for row, own in zip(rows, logits, strict=True):
        decoder.write(row, int(own.argmax()))
    return logits


def q_proj(bank):
    return bank.model.get_submodule("model.layers.0.self_attn.q_proj")


def test_hooks_rest_once_it_is_known_what_they_do(bank, monkeypatch):
    decoder, calls = running(bank), []
    for _ in range(3):
        step(decoder)
    called = Hook.__call__
    monkeypatch.setattr(Hook, "__call__", lambda self, *args: calls.append(args[0]) or called(self, *args))
    step(decoder)
    assert not any(type(module) is torch.nn.Linear for module in calls if module is not bank.model.lm_head)


def test_a_hook_of_somebody_else_is_called_from_its_first_step_on(bank):
    decoder, seen = running(bank), []
    for _ in range(3):
        step(decoder)
    handle = q_proj(bank).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    step(decoder)
    assert len(seen) == 1
    handle.remove()
    handle = q_proj(bank).register_forward_hook(lambda module, args, out: 0 * out)
    changed = step(decoder)
    handle.remove()
    assert not torch.equal(changed, step(decoder))
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    step(decoder)
    everywhere.remove()
    assert q_proj(bank) in seen


def test_another_forward_put_there_is_used(bank):
    decoder, q = running(bank), q_proj(bank)
    for _ in range(3):
        step(decoder)
    own, seen = q.forward, []
    q.forward = lambda x: seen.append(x.shape) or own(x)
    step(decoder)
    q.forward = own
    assert len(seen) == 1


def test_other_callers_and_copies_have_a_module_as_it_was(bank):
    decoder, x = running(bank), torch.randn(2, 3, 16, dtype=bank.model.dtype)
    with torch.no_grad():
        before = q_proj(bank)(x)
        step(decoder)
        step(decoder)
        assert torch.equal(q_proj(bank)(x), before)
        for other in (copy.deepcopy(q_proj(bank)), pickle.loads(pickle.dumps(q_proj(bank)))):
            assert torch.equal(other(x), before)
    bank.detach()
    assert "_call_impl" not in vars(q_proj(bank)) and "forward" not in vars(q_proj(bank))
