"""Parallel adapters and MAM: AdapterHub's logits and losses, a batch's law, folders that open again."""

from __future__ import annotations

import pytest
import torch

import inlay
from adapterhub import FAMILIES, base_of, copy, fill_bottlenecks, inputs_of, reference, same_curve
from inlay.methods.table import METHODS
from test_laws import acts, gradients, padded, same_gradients
from zoo import make

KINDS = {
    "par_bn": lambda: inlay.Parallel(reduction_factor=4),
    "par_bn_both": lambda: inlay.Parallel(reduction_factor=4, mh_adapter=True, non_linearity="gelu"),
    "scaled_par_bn": lambda: inlay.ScaledParallel(reduction_factor=4),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_and_learns_what_adapterhub_does(name, kind):
    bank = inlay.attach(base_of(name))
    adapter = bank.add("a", KINDS[kind](), seed=0)
    fill_bottlenecks(adapter.parts[0], bank.base, name, kind)
    bank.set("a")
    same_curve(bank, "a", name, kind, inputs_of(name))


def prefix_weights(name):
    """AdapterHub's network of prefixes."""
    pools = {"bert": "bert.encoder.layer.0.attention.self", "gpt2": "transformer.h.0.attn"}
    pool = pools.get(name, "model.layers.0.self_attn")
    start = f"{pool}.prefix_tuning.pool.prefix_tunings.mam.self_prefix"
    keys = {"embedding": "wte.weight", "w1": "control_trans.0.weight", "b1": "control_trans.0.bias"}
    keys |= {"w2": "control_trans.2.weight", "b2": "control_trans.2.bias"}
    return {own: reference(name, "mam", f"{start}.{theirs}") for own, theirs in keys.items()}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_mam_gives_and_learns_what_adapterhub_does(name):
    bank = inlay.attach(base_of(name))
    adapter = bank.add("a", inlay.MAM(num_virtual_tokens=3, encoder_hidden_size=8, reduction_factor=4), seed=0)
    prefix, parallel = adapter.parts
    for own, value in prefix_weights(name).items():
        copy(prefix.params[""][own], value)
    fill_bottlenecks(parallel, bank.base, name, "mam")
    bank.set("a")
    same_curve(bank, "a", name, "mam", unmoved(inputs_of(name)))


def unmoved(inputs, prefix=3):
    """A prefix moves the positions of a row here, as in HF PEFT; AdapterHub leaves them where they are."""
    ids = inputs["input_ids"]
    return {**inputs, "position_ids": torch.arange(ids.shape[1])[None].expand_as(ids) - prefix}


def test_mam_from_two_methods_where_keys_are_narrower_than_the_stream():
    bank = inlay.attach(base_of("llama"))
    adapter = bank.add("a", [inlay.PrefixTuning(num_virtual_tokens=3), inlay.Parallel(reduction_factor=4)], seed=0)
    own = prefix_weights("llama")  # its table is of the stream's width, ours of the keys'
    inner = torch.tanh(own["embedding"] @ own["w1"].T + own["b1"])
    copy(adapter.parts[0].params[""]["prefix"], inner @ own["w2"].T + own["b2"])
    fill_bottlenecks(adapter.parts[1], bank.base, "llama", "mam")
    bank.set("a")
    logits = bank.model(**unmoved(inputs_of("llama"))).logits
    # The reference computes this softmax in float32.
    torch.testing.assert_close(logits, reference("llama", "mam", "logits"), rtol=0, atol=1e-6)


def test_mam_is_a_preset_of_two_parts_with_settings_of_its_own():
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", METHODS["mam"](num_virtual_tokens=5, scaling=2.0, layers=[1]), seed=0)
    prefix, parallel = adapter.methods
    assert isinstance(prefix, inlay.PrefixTuning) and isinstance(parallel, inlay.Parallel)
    assert prefix.num_virtual_tokens == 5 and prefix.encoder_hidden_size == 800
    assert parallel.scaling == 2.0 and {site.layer for site in adapter.parts[1].sites.values()} == {1}


def test_a_fresh_adapter_changes_nothing():
    bank = inlay.attach(make("llama"))
    ids = torch.arange(3, 9)[None]
    plain = bank.model(input_ids=ids).logits
    for kind in ("parallel", "scaled_parallel"):
        bank.add(kind, METHODS[kind](), seed=0)
        bank.set(kind)
        assert torch.equal(bank.model(input_ids=ids).logits, plain)


# ---- the laws

WISHES = {
    "parallel": lambda: inlay.Parallel(reduction_factor=4),
    "scaled": lambda: inlay.ScaledParallel(mh_adapter=True, dropout=0.1),
    "mam": lambda: inlay.MAM(num_virtual_tokens=2, encoder_hidden_size=6),
    "houlsby": lambda: inlay.Houlsby(reduction_factor=4),
    "lora": lambda: inlay.LoRA(r=4),
    "parts": lambda: [inlay.Parallel(reduction_factor=8), inlay.Houlsby(reduction_factor=4), inlay.IA3()],
}
ROWS = [None, *WISHES, ["parallel", "houlsby", "lora"], {"parallel": 0.5, "scaled": 2.0}, ["mam", "lora"]]


@pytest.mark.parametrize("form", ["right", "packed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_neox", "qwen3_moe"])
def test_a_row_is_what_it_is_alone(name, form):
    bank = inlay.attach(make(name))
    rows = [row for row in ROWS if name != "qwen3_moe" or row != "parts"]
    for wish, method in WISHES.items():
        if wish in rows:
            bank.add(wish, method(), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    own = [torch.randint(3, 48, (1, 4 + i % 3)) for i in range(len(rows))]
    sizes, parameters = [piece.shape[1] for piece in own], list(bank.parameters())
    if form == "packed":
        with bank.stream(list(zip(rows, sizes, strict=True))):
            found = [part[None] for part in bank.model(input_ids=torch.cat(own, 1)).logits[0].split(sizes)]
    else:
        ids, mask = padded(own, "right")
        with bank.route(rows):
            whole = bank.model(input_ids=ids, attention_mask=mask).logits
        found = [row[None, :n] for row, n in zip(whole, sizes, strict=True)]
    totals, loss = None, 0.0
    for row, piece, ours in zip(rows, own, found, strict=True):
        with bank.route([None]):
            plain = bank.model(input_ids=piece).logits
        with bank.route([row]):
            alone = bank.model(input_ids=piece).logits
        acts(bank, name, row, alone, plain)
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-9)
        if alone.requires_grad:
            grads = gradients(alone.square().sum(), parameters)
            totals = grads if totals is None else [a + b for a, b in zip(totals, grads, strict=True)]
            loss = loss + ours.square().sum()
    same_gradients(gradients(loss, parameters), totals)
