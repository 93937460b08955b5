"""Where virtual tokens and prefixes meet what a base does of its own: heads that take means, keys read again."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

import inlay
from inlay.errors import UsageError
from inlay.sites.observe import attention_sites
from inlay.sites.pooling import reads_every_state
from zoo import small

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
