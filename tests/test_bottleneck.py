"""Bottleneck adapters give the logits that AdapterHub's package gave; golden/make_adapterhub.py made the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from zoo import make

GOLDEN = load_file(Path(__file__).parent / "golden" / "adapterhub.safetensors")
SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
BASES = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0,
            scale_decoder_outputs=True,
        )
    ),
}  # fmt: skip
TIGHT = {"bert": 1e-9, "llama": 1e-9, "gpt2": 1e-9, "t5": 1e-7}  # T5 computes its attention bias in float32
PLACES = {  # where AdapterHub keeps the adapter of a block's attention and of its feed-forward part
    "bert": ("attention.output.adapters", "output.adapters"),
    "llama": ("attention_adapters.adapters", "output_adapters.adapters"),
    "gpt2": ("attention_adapters.adapters", "output_adapters.adapters"),
    "t5": ("layer.0.adapters", "layer.{last}.adapters"),
}
NAMES = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight"}
NAMES |= {"up_bias": "adapter_up.bias"}


def base_of(name, golden=GOLDEN):
    model = BASES[name]().double().eval()
    stored = {k.removeprefix(f"{name}/base/"): v for k, v in golden.items() if k.startswith(f"{name}/base/")}
    model.load_state_dict(stored, strict=False)
    model.tie_weights()
    return model


def filled(bank, name, kind):
    """The adapter with AdapterHub's weights, each in the place of the block and part it belongs to."""
    method = inlay.Houlsby(reduction_factor=4) if kind == "houlsby" else inlay.Pfeiffer(reduction_factor=4)
    adapter = bank.add(kind, method, seed=0)
    used = set()
    for path, site in adapter.sites.items():
        block = next(b for b in bank.base.blocks if path.startswith(b + "."))
        place = PLACES[name][site.part == "mlp"].format(last=2 if site.stack == "decoder" else 1)
        for own, theirs in NAMES.items():
            key = f"{name}/{kind}/{block}.{place}.{kind}.{theirs}"
            used.add(key)
            with torch.no_grad():
                adapter.params[path][own].copy_(GOLDEN[key])
    whole = {k for k in GOLDEN if k.startswith(f"{name}/{kind}/") and not k.endswith("logits")}
    assert used == whole
    return adapter


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", list(BASES))
def test_logits_are_those_of_adapterhub(name, kind):
    model, ids = base_of(name), GOLDEN[f"{name}/ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
    torch.testing.assert_close(model(**inputs).logits, GOLDEN[f"{name}/logits"], rtol=0, atol=TIGHT[name])
    bank = inlay.attach(model)
    filled(bank, name, kind)
    bank.set(kind)
    torch.testing.assert_close(model(**inputs).logits, GOLDEN[f"{name}/{kind}/logits"], rtol=0, atol=TIGHT[name])


@pytest.mark.parametrize("kind", [inlay.Houlsby, inlay.Pfeiffer])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_neox", "qwen3_moe", "t5"])
def test_a_saved_adapter_opens_again(name, kind, tmp_path):
    bank = inlay.attach(make(name))
    bank.add("a", kind(reduction_factor=4, layers=[1]), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(3, 48, (2, 5))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    plain = bank.model(**inputs).logits
    bank.set("a")
    expected = bank.model(**inputs).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    bank.save("a", tmp_path)
    other = inlay.attach(make(name))
    other.load("b", tmp_path)
    other.set("b")
    torch.testing.assert_close(other.model(**inputs).logits, expected, rtol=0, atol=1e-12)


def test_it_starts_near_the_identity_as_the_reference_does():
    bank = inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.Houlsby(reduction_factor=2), seed=1)
    ups = torch.cat([params["up"].flatten() for params in adapter.params.values()])
    assert abs(float(ups.std()) - 0.02) < 0.002
