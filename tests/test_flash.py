"""Whole streams in one attention kernel: same numbers as in blocks.

Without CUDA, a plain implementation of the kernel's contract stands in for it, so that all around it is tried.
"""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.batch import flash
from test_laws import EXACT, bank_of, gradients, ids_of, lengths_of, rows_of
from zoo import make

NAMES = ["llama", "qwen3", "gemma3", "mistral", "gpt2", "gpt_neox", "bert"]


def kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What torch's kernel computes, one segment at a time."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    assert enable_gqa or q.shape[1] == k.shape[1]
    made, (left, right) = [], window_size
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        times = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(times, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b] * scale, keys)
        at, own = torch.arange(d - c)[None], torch.arange(b - a)[:, None] + (d - c) - (b - a)
        seen = ((at >= own - left) | torch.tensor(left < 0)) & ((at <= own + right) | torch.tensor(right < 0))
        made.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(made)


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def counted(*args, **more):
        seen.append(more["window_size"])
        return kernel(*args, **more)

    monkeypatch.setattr(flash, "KERNEL", counted)
    monkeypatch.setattr(flash, "fits", lambda q, v: True)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_every_method_is_the_same_in_one_kernel(name, calls, monkeypatch):
    bank = bank_of(name)
    rows = rows_of(bank)
    ids = torch.cat(ids_of(rows), 1)
    made = []
    for fits in (True, False):
        monkeypatch.setattr(flash, "fits", lambda q, v, fits=fits: fits)
        before = len(calls)
        with bank.stream(list(zip(rows, lengths_of(rows), strict=True))):
            logits = bank.model(input_ids=ids).logits
        made.append((logits, gradients(logits.square().sum(), list(bank.parameters()))))
        assert (len(calls) > before) == fits
    (flashed, own), (blocks, expected) = made
    torch.testing.assert_close(flashed, blocks, **EXACT)
    for one, two in zip(own, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_sliding_windows_are_told_to_the_kernel(calls):
    bank = inlay.attach(make("mistral"))
    with bank.stream([(None, 9), (None, 3)]):
        bank.model(input_ids=torch.arange(3, 15)[None])
    assert set(calls) == {(3, 0)}  # a window of 4 tokens, its own among them


def test_a_rule_that_is_no_window_stays_in_blocks():
    device = torch.device("cpu")
    assert flash.window_of(lambda b, h, q, k: (k <= q) & (k // 4 == q // 4), 9, device) is None  # chunks
    assert flash.window_of(lambda b, h, q, k: (k <= q) & (k // 4 == q // 4), 4, device) == (3, 0)
    assert flash.window_of(lambda b, h, q, k: (k - q).abs() <= 2, 9, device) == (2, 2)


def test_what_the_kernel_takes():
    q = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not flash.fits(q, q)  # not on a GPU
    assert flash.KERNEL is None or set(flash.inspect.signature(flash.KERNEL).parameters) >= flash.NEEDED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_torchs_kernel_equals_blocks_on_a_gpu(name, monkeypatch):
    import transformers as tf

    config = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=48)
    config |= dict(intermediate_size=64, num_hidden_layers=2, pad_token_id=0)
    torch.manual_seed(0)
    kind = {"llama": tf.LlamaForCausalLM, "mistral": tf.MistralForCausalLM}[name]
    bank = inlay.attach(kind(kind.config_class(**config)).eval().to("cuda", torch.bfloat16))
    bank.add("lora", inlay.LoRA(r=4), seed=1)
    bank.add("prefix", inlay.PrefixTuning(num_virtual_tokens=3), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made, lengths = [], [40, 7, 100]
    ids = torch.randint(3, 48, (1, sum(lengths)), device="cuda")
    for _ in range(2):
        with bank.stream(list(zip(["lora", None, "prefix"], lengths, strict=True))):
            logits = bank.model(input_ids=ids).logits.float()
        made.append([logits, *gradients(logits.square().sum(), list(bank.parameters()))])
        monkeypatch.setattr(flash, "fits", lambda q, v: False)
    for one, two in zip(*made, strict=True):
        assert (one - two).norm() <= 0.03 * two.norm()
