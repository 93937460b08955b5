"""Where virtual tokens and prefixes meet what a base does of its own: heads that take means, keys read again."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers as tf

import inlay
from inlay.errors import UsageError
from inlay.sites.keys import keys_and_values
from inlay.sites.observe import attention_sites
from inlay.sites.pooling import reads_every_state
from inlay.sites.several import checked, value_heads
from zoo import make, small

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))


def classifier(pooling):
    torch.manual_seed(0)
    config = tf.EuroBertConfig(**small(num_labels=3, classifier_pooling=pooling))
    return tf.EuroBertForSequenceClassification(config).eval().double()


@pytest.mark.parametrize(("pooling", "every"), [("bos", False), ("mean", True), ("late", True)])
def test_a_head_that_takes_a_mean_refuses_virtual_tokens(pooling, every):
    model = classifier(pooling)
    states = []
    handle = model.model.register_forward_hook(lambda m, a, out: states.append(out[0]))
    logits = model(input_ids=IDS).logits
    handle.remove()
    reached = (torch.autograd.grad(logits.square().sum(), states[0])[0] != 0).any(-1).all(0)
    assert bool(reached.all()) == every and bool(reached[0])
    assert reads_every_state(model, model.model) == every
    bank = inlay.attach(model)
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3), seed=1)
    bank.add("lora", inlay.LoRA(r=2), seed=1)
    with bank.route(["lora", None]):
        model(input_ids=IDS)
    if every:
        with pytest.raises(UsageError, match="takes a mean over a row's tokens"), bank.route(["prompt", "lora"]):
            model(input_ids=IDS)
    else:
        with bank.route(["prompt", "lora"]):
            model(input_ids=IDS)


def test_layers_that_read_keys_again_have_the_prefix_of_those_that_made_them(tmp_path):
    config = tf.Gemma3nTextConfig(
        **small(
            num_hidden_layers=4, head_dim=4, num_kv_shared_layers=2, intermediate_size=[24] * 4, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=48,
            hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Gemma3nForCausalLM(config).eval().double()
    reference = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    expected = reference.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    bank = inlay.attach(reference.get_base_model())
    bank.load("theirs", tmp_path)
    with bank.route(["theirs"] * 2):
        ours = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=0, atol=1e-5)
    readers = {s.path: s.keys_of for s in attention_sites(bank.base) if s.keys_of}
    assert readers == {f"model.layers.{n}.self_attn": f"model.layers.{n - 2}.self_attn" for n in (2, 3)}


def test_heads_that_attention_repeats_behind_the_cache_have_one_prefix(tmp_path):
    config = tf.JetMoeConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4, intermediate_size=24,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    bank = inlay.attach(tf.JetMoeForCausalLM(config).eval().double())
    assert {(s.heads, s.repeats) for s in attention_sites(bank.base)} == {(2, 2)}
    bank.add("prefix", inlay.PrefixTuning(num_virtual_tokens=3), seed=1)
    bank.save("prefix", tmp_path)
    with bank.route(["prefix"] * 2):
        ours = bank.model(input_ids=IDS).logits
    bank.detach()
    theirs = peft.PeftModel.from_pretrained(bank.model, tmp_path).eval().double()
    expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_base_that_cannot_run_with_virtual_tokens_says_so():
    config = tf.ReformerConfig(
        vocab_size=48, hidden_size=16, attention_head_size=4, num_attention_heads=4, feed_forward_size=24,
        attn_layers=["local", "local"], axial_pos_shape=[4, 4], axial_pos_embds_dim=[8, 8], is_decoder=True,
        local_attn_chunk_length=4, max_position_embeddings=16, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    bank = inlay.attach(tf.ReformerModelWithLMHead(config).eval())
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3), seed=1)
    ids = torch.randint(3, 48, (2, 16), generator=torch.Generator().manual_seed(1))
    bank.model(input_ids=ids)  # as many as it has positions for
    refused = pytest.raises(UsageError, match="fails in a forward with prefixes or virtual tokens")
    with refused, bank.route(["prompt"] * 2):
        bank.model(input_ids=ids)
    with pytest.raises(ValueError), bank.route([None] * 2):  # a plain error stays as it is
        bank.model(input_ids=torch.cat([ids, ids], 1))


@pytest.mark.parametrize("method", [inlay.PromptTuning(num_virtual_tokens=3), inlay.PrefixTuning(num_virtual_tokens=3)])
def test_positions_that_a_caller_counts_by_the_cache_leave_virtual_tokens_out(method):
    """As models of images do, whose positions are the columns that their cache holds, virtual ones among them."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**small())).eval().double()

    def steps(rows):
        cache, logits = tf.DynamicCache(), []
        mask = torch.ones(rows, IDS.shape[1], dtype=torch.long)
        for span in (slice(0, 4), slice(4, 5), slice(5, 6)):
            ids, seen = IDS[:rows, span], cache.get_seq_length()
            positions = torch.arange(seen, seen + ids.shape[1])[None]
            logits.append(
                model(ids, attention_mask=mask[:, : span.stop], position_ids=positions, past_key_values=cache).logits
            )
        return torch.cat(logits, 1)

    plain = steps(1)
    bank = inlay.attach(model)
    bank.add("virtual", method, seed=1)
    with bank.route([None, "virtual"]):
        mixed = steps(2)
        whole = model(IDS).logits
    torch.testing.assert_close(mixed[:1], plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-12)


def from_peft(model, config, folder, ids, **more):
    """The logits of HF PEFT's model by `config`, with random parameters, and those of its checkpoint here."""
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).double() * 0.3)
    reference.double()
    reference.save_pretrained(folder)
    bank = inlay.attach(model)
    bank.load("a", folder)
    with torch.no_grad():
        plain = bank.model(input_ids=ids, **more).logits
        with bank.route(["a"] * len(ids)):
            ours = bank.model(input_ids=ids, **more).logits
        theirs = reference(input_ids=ids, **more).logits
    assert (theirs - plain).abs().max() > 1e-3
    return theirs, ours, bank


def test_a_layer_that_computes_attention_twice_reads_half_of_the_prefix_each_time(tmp_path):
    """Each call has other heads of the values: packed, computed again and from a cache too."""
    torch.manual_seed(0)
    model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**small(num_attention_heads=4, num_key_value_heads=2))).eval()
    theirs, ours, bank = from_peft(
        model.double(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path, IDS
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    heads = [site.value_heads for site in attention_sites(bank.base)]
    assert heads == [((0, 0), (1, 1))] * len(heads)
    with torch.no_grad():
        with bank.stream([("a", 6), (None, 6)]):
            packed = bank.model(input_ids=IDS.flatten()[None]).logits[0, :6]
        with bank.route(["a"]):
            first = bank.model(input_ids=IDS[:1, :4], use_cache=True)
            rest = bank.model(input_ids=IDS[:1, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(packed, ours[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(rest, ours[:1, 4:], rtol=0, atol=1e-9)
    found = []
    for recompute in (False, True):
        with bank.recomputing() if recompute else nullcontext(), bank.route(["a", "a"]):
            loss = bank.model(input_ids=IDS).logits.square().sum()
            found.append(torch.autograd.grad(loss, list(bank.parameters("a"))))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_prefixes_that_start_as_tokens_have_all_heads_of_a_layer_that_computes_attention_twice():
    torch.manual_seed(0)
    model = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**small(num_attention_heads=4, num_key_value_heads=2))).eval()
    bank = inlay.attach(model.double())
    found = keys_and_values(bank.base, IDS[0])
    cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
    for layer, site in zip(cache.layers, attention_sites(bank.base), strict=True):
        for own, cached in zip(found[site.module], (layer.keys, layer.values), strict=True):
            torch.testing.assert_close(own, cached[0], rtol=0, atol=1e-12)


def test_heads_of_values_that_no_cache_holds_are_not_guessed():
    values = torch.randn(1, 2, 3, 4)
    layer = SimpleNamespace(values=values)
    cache, module = SimpleNamespace(layers=[layer]), SimpleNamespace(layer_idx=0)
    assert value_heads(module, {"cache": cache}, [values[:, :1], values[:, 1:]]) == ((0,), (1,))
    assert value_heads(module, {"cache": cache}, [values[:, :1], values[:, :1]]) is None
    assert value_heads(module, {"cache": cache}, [values[:, :1], values[:, 1:] + 1]) is None
    assert value_heads(module, {}, [values[:, :1], values[:, 1:]]) is None
    with pytest.raises(UsageError, match="computes attention several times"):
        checked([replace(attention_sites(inlay.attach(make("llama")).base)[0], value_heads=None)])


def test_a_base_that_takes_no_cache_moves_no_positions_behind_a_prefix(tmp_path):
    """EuroBERT hands a cache on to its layers unseen: HF PEFT's prefixes act there, and nothing counts them."""
    torch.manual_seed(0)
    model = tf.EuroBertForMaskedLM(tf.EuroBertConfig(**small())).eval().double()
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
    theirs, ours, _ = from_peft(model, config, tmp_path, IDS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_mean_over_the_pixels_of_a_row_refuses_virtual_tokens():
    torch.manual_seed(0)
    config = tf.ImageGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=49, num_labels=3)
    bank = inlay.attach(tf.ImageGPTForImageClassification(config).eval())
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3), seed=1)
    with pytest.raises(UsageError, match="takes a mean over a row's tokens"), bank.route(["prompt", None]):
        bank.model(input_ids=IDS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_tokens_away_from_prompts_that_attention_reads(side):
    """A token's queries of LLaMA-Adapter's prompts say where it stands: counted from its row's first token."""
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.LlamaAdapter(adapter_len=3), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(0.5)
        with bank.route(["a"]):
            alone = bank.model(input_ids=IDS[:1]).logits[0]
        own = slice(2, 8) if side == "left" else slice(0, 6)
        ids, mask = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
        ids[:, own], mask[:, own] = IDS, 1
        with bank.route(["a", None]):
            padded = bank.model(input_ids=ids, attention_mask=mask).logits[:, own]
            last = bank.model(input_ids=ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
            step = bank.model(input_ids=ids[:, 7:], attention_mask=mask, past_key_values=last.past_key_values).logits
        plain = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(padded[0], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(padded[1], plain[1], rtol=0, atol=1e-6)
    if side == "left":
        torch.testing.assert_close(step[0, 0], alone[-1], rtol=0, atol=1e-9)
    assert (alone - plain[0]).abs().max() > 1e-3
