"""Adapters that only answer, held in the base's dtype: what they give does not change by a bit."""

from __future__ import annotations

import pytest
import torch

from inlay.bank import narrowing
from inlay.bank.narrowing import narrow
from test_laws import bank_of


def bytes_of(adapter):
    return sum(value.numel() * value.element_size() for value in adapter.parameters())


def answers(bank, names):
    ids = torch.arange(6, 16)[None].repeat(len(names), 1)
    with torch.no_grad(), bank.route(names):
        return bank.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("base", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_narrow_adapters_give_the_same(base):
    bank = bank_of(base, torch.bfloat16)
    names, small = [*bank.adapters], bank.adapters["small"]
    before, held = answers(bank, names), bytes_of(small)
    for adapter in bank.adapters.values():
        narrow(adapter)
    assert bytes_of(small) == held // 2
    after = answers(bank, names)
    differing = [name for name, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)]
    assert not differing and before.isfinite().all() and len({row.sum().item() for row in before}) > len(names) // 2


def test_nothing_is_narrowed_below_a_base_that_is_not():
    bank = bank_of("llama")
    before = {name: [value.clone() for value in adapter.parameters()] for name, adapter in bank.adapters.items()}
    for name, adapter in bank.adapters.items():
        narrow(adapter)
        now = [*adapter.parameters()]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before[name], now, strict=True))


def test_nothing_is_narrowed_beyond_half_precision(monkeypatch):
    bank = bank_of("llama", torch.bfloat16)
    monkeypatch.setattr(narrowing, "_dtype", lambda site: torch.float8_e4m3fn)
    narrow(bank.adapters["small"])
    assert {value.dtype for value in bank.adapters["small"].parameters()} == {torch.float32}
