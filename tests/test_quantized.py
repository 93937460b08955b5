"""Adapters beside a quantized base: its own modules are called, its weights never read."""

from __future__ import annotations

import torch

import inlay
from zoo import make


def test_an_int8_base_carries_adapters():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make("llama", dtype=torch.float32)
    ids = torch.randint(3, 48, (3, 5), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).logits
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "head" not in name
    )
    before = model(input_ids=ids).logits
    assert not torch.equal(before, plain)
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=1)
    bank.add("b", inlay.PrefixTuning(num_virtual_tokens=2), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with bank.route(["a", None, "b"]):
        mixed = model(input_ids=ids).logits
    torch.testing.assert_close(mixed[1], before[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], before[0], atol=1e-3) and not torch.allclose(mixed[2], before[2], atol=1e-3)
    mixed.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())
