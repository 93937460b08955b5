"""Selective tuning: parts of a base by words, trained as torch trains those very numbers of the model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from inlay.errors import UsageError
from zoo import make, small

EXACT = {"rtol": 0, "atol": 1e-9}
IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))

# Each case: a base, the words, and by the end of a parameter's name what of it is trained: True, or an index.
HEADS_2_3 = slice(8, 16)  # heads 2 and 3 of 4, of 4 features each
SPREAD = [f for head in (1, 3) for f in range(head * 4, head * 4 + 4)]
CASES = {
    "layers": ("llama", "layers 1", {"layers.1.": True}),
    "mlp and norms": (
        "llama", "mlp of last 1; norms",
        {"layers.1.mlp.": True, "layernorm.weight": True, "model.norm.weight": True},
    ),
    "grouped heads": (
        "llama", "layers 0 heads 2,3",
        {
            "0.self_attn.q_proj.weight": HEADS_2_3, "0.self_attn.k_proj.weight": slice(4, 8),
            "0.self_attn.v_proj.weight": slice(4, 8), "0.self_attn.o_proj.weight": (slice(None), HEADS_2_3),
        },
    ),
    "query heads": (
        "qwen3", "query heads 3 of layer 1",
        {"1.self_attn.q_proj.weight": slice(12, 16), "1.self_attn.o_proj.weight": (slice(None), slice(12, 16))},
    ),
    "kv heads": (
        "mistral", "kv heads 1",
        {"k_proj.weight": slice(4, 8), "v_proj.weight": slice(4, 8)},
    ),
    "fused by thirds": (
        "gpt2", "layers 1 heads 1,3; attention of first 1",
        {
            "h.1.attn.c_attn.weight": (slice(None), SPREAD + [16 + f for f in SPREAD] + [32 + f for f in SPREAD]),
            "h.1.attn.c_attn.bias": SPREAD + [16 + f for f in SPREAD] + [32 + f for f in SPREAD],
            "h.1.attn.c_proj.weight": SPREAD, "h.0.attn.": True,
        },
    ),
    "fused by heads": (
        "gpt_neox", "heads 1",
        {
            "query_key_value.weight": slice(12, 24), "query_key_value.bias": slice(12, 24),
            "attention.dense.weight": (slice(None), slice(4, 8)),
        },
    ),
    "fused groups": (
        "phi3", "layer 0 heads 0-1",
        {
            "0.self_attn.qkv_proj.weight": [*range(8), *range(16, 20), *range(24, 28)],
            "0.self_attn.o_proj.weight": (slice(None), slice(0, 8)),
        },
    ),
    "encoder": (
        "bert", "heads 0, norms in layers 0,1",
        {
            **{f"self.{n}.{of}": slice(0, 4) for n in ("query", "key", "value") for of in ("weight", "bias")},
            "attention.output.dense.weight": (slice(None), slice(0, 4)), "LayerNorm.": True,
        },
    ),
}  # fmt: skip


def trained_numbers(model, wanted):
    """For each parameter, which of its numbers are trained: True there."""
    masks = {}
    for name, parameter in model.named_parameters():
        if "embeddings.LayerNorm" in name or "predictions" in name:
            continue
        found = [index for end, index in wanted.items() if end in name]
        if found:
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            mask[... if found[0] is True else found[0]] = True
            masks[name] = mask
    return masks


def loss_of(model, ids=IDS):
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("case", list(CASES))
def test_training_is_that_of_those_numbers_of_the_model(case):
    name, select, wanted = CASES[case]
    model, theirs = make(name), make(name)
    masks = trained_numbers(theirs, wanted)
    rates = torch.optim.Adam([p for n, p in theirs.named_parameters() if n in masks], lr=0.01)
    for n, parameter in theirs.named_parameters():
        parameter.requires_grad_(n in masks)
    bank = inlay.attach(model)
    bank.add("a", inlay.Selective(select=select))
    assert len(bank.adapters["a"]) == sum(int(mask.sum()) for mask in masks.values())
    ours = torch.optim.Adam(bank.parameters("a"), lr=0.01)
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, **EXACT)
    for _ in range(3):
        for optimizer, loss in ((ours, loss_of(bank.model)), (rates, loss_of(theirs))):
            optimizer.zero_grad()
            loss.backward()
            if optimizer is rates:
                for n, parameter in theirs.named_parameters():
                    if n in masks:
                        parameter.grad.mul_(masks[n])
            optimizer.step()
    trained = theirs(input_ids=IDS).logits
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, trained, rtol=0, atol=1e-6)
    bank.set(None)
    assert float((bank.model(input_ids=IDS).logits - trained).detach().abs().max()) > 1e-3
    bank.merge("a")
    bank.detach()
    for n, parameter in theirs.named_parameters():
        torch.testing.assert_close(bank.model.get_parameter(n), parameter, rtol=0, atol=1e-6)


def shaken(bank, name):
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)


@pytest.mark.parametrize("case", ["grouped heads", "fused by thirds", "mlp and norms"])
def test_it_is_saved_as_what_was_chosen_alone_and_merged_exactly(case, tmp_path):
    name, select, _ = CASES[case]
    bank = inlay.attach(make(name))
    bank.add("a", inlay.Selective(select=select))
    shaken(bank, "a")
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == len(bank.adapters["a"])
    other = inlay.attach(make(name))
    other.load("b", tmp_path)
    other.set("b")
    torch.testing.assert_close(other.model(input_ids=IDS).logits, expected, **EXACT)
    other.set(None)
    other.merge("b")
    torch.testing.assert_close(other.model(input_ids=IDS).logits, expected, **EXACT)


def test_many_selections_share_a_batch_and_a_head_moves_its_own_numbers():
    bank = inlay.attach(make("llama"))
    for head in (0, 1):
        bank.add(f"heads{head}", inlay.Selective(select=f"heads {2 * head},{2 * head + 1}"))
        shaken(bank, f"heads{head}")
    bank.add("mlp", inlay.Selective(select="mlp of first 1"))
    shaken(bank, "mlp")
    rows = ["heads0", "mlp", "heads1"]
    with bank.route(rows):
        together = bank.model(input_ids=IDS).logits
    for number, row in enumerate(rows):
        with bank.route([row]):
            alone = bank.model(input_ids=IDS[number : number + 1]).logits
        torch.testing.assert_close(together[number : number + 1], alone, **EXACT)


def olmo2():
    """It normalises the queries of all heads together."""
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**small())).double().eval()


REFUSED = {
    "heads 2,3": ("olmo2", "heads of model.layers.0.self_attn"),
    "": ("llama", "no part"),
    "legs of last 2": ("llama", "'legs of last 2'"),
    "mlp of last 1, norms of layers 0,1": ("llama", "names layers twice"),
    "mlp of layers 0,9": ("llama", "layer 9 does not exist"),
    "layers 0 heads 0": ("llama", "shares its keys and values with heads 1"),
    "heads 4": ("llama", "has no heads 4"),
    "kv heads 2": ("llama", "has no kv heads 2"),
    "heads 0": ("bloom", "names heads"),
    "layers 0": ("mamba", "would leave"),
    "layers 1": ("qwen3_moe", "would leave"),
    "cross-attention": ("llama", "names no linear layer"),
}


@pytest.mark.parametrize("select", list(REFUSED))
def test_what_cannot_be_meant_is_refused_by_name(select):
    name, words = REFUSED[select]
    bank = inlay.attach(olmo2() if name == "olmo2" else make(name))
    with pytest.raises(UsageError) as caught:
        bank.add("a", inlay.Selective(select=select))
    assert words in str(caught.value) and caught.value.remedy
    assert not bank.adapters


def test_seeing_heads_leaves_nothing_behind():
    model = make("llama")
    plain, before = model(input_ids=IDS).logits, copy.deepcopy(vars(model.model.layers[0].self_attn.q_proj))
    bank = inlay.attach(model)
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    inlay.Selective(select="heads 0,1").sites(bank.base)
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == hooks
    assert not any(p.grad is not None for p in model.parameters())
    bank.detach()
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert vars(model.model.layers[0].self_attn.q_proj).keys() == before.keys()
