"""Other holders of weights: what accelerate, a resized table or another library makes of a base, and of its calls."""

from __future__ import annotations

import inspect

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

import inlay
from inlay.errors import UsageError
from zoo import make

IDS = torch.tensor([[3, 9, 4, 7, 11], [5, 6, 8, 2, 1]])


def shake(bank, name="it"):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in bank.adapters[name].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bank


def attached(method, name="llama"):
    bank = inlay.attach(make(name))
    bank.add("it", method, seed=0)
    return shake(bank)


# ---- accelerate


def test_an_offloaded_base_is_refused_before_and_after_attaching():
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight is not in memory \(accelerate offloads it"):
        inlay.attach(accelerate.cpu_offload(make("llama"), execution_device=torch.device("cpu")))
    bank = attached(inlay.LoRA(r=2))
    accelerate.cpu_offload(bank.model, execution_device=torch.device("cpu"))
    for refused in (
        lambda: bank.merge("it"),
        lambda: bank.save("it", "nowhere"),
        lambda: bank.add("more", inlay.DoRA(r=2)),
    ):
        with pytest.raises(UsageError, match="not in memory"):
            refused()
    with bank.route(["it"]), pytest.raises(UsageError, match="not in memory"):
        bank.model(input_ids=IDS)
    with bank.route([None]):
        torch.testing.assert_close(bank.model(input_ids=IDS).logits, make("llama")(input_ids=IDS).logits)


@pytest.mark.parametrize("method", [inlay.LoRA(r=2), inlay.DoRA(r=2)])
@pytest.mark.parametrize("late", [False, True])
def test_a_base_with_accelerates_hooks_works(method, late):
    plain = attached(method)
    model = make("llama")
    if not late:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    bank = inlay.attach(model)
    bank.add("it", method, seed=0)
    shake(bank)
    if late:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for one in (plain, bank):
        one.set("it")
        one.model(input_ids=IDS, labels=IDS).loss.backward()
    for expected, found in zip(plain.parameters("it"), bank.parameters("it"), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    expected = plain.model(input_ids=IDS).logits
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected)
    bank.set(None)
    assert not torch.allclose(bank.model(input_ids=IDS).logits, expected)
    bank.merge("it")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected)


def test_a_weight_that_was_never_loaded_is_named():
    model = make("llama")
    model.model.norm.to("meta")
    with pytest.raises(UsageError, match=r"model\.norm\.weight is not in memory"):
        inlay.attach(model)


# ---- a base that was changed


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize(
    "method",
    [inlay.LoRA(r=2), inlay.LoRA(r=2, targets="^.*(embed_tokens|wte|shared|word_embeddings)$"), inlay.PromptTuning()],
    ids=["lora", "table", "prompt"],
)
@pytest.mark.parametrize("rows", [40, 60])
def test_a_resized_table_is_named(name, method, rows):
    bank = attached(method, name)
    bank.set("it")
    model = bank.model
    more = {"decoder_input_ids": IDS} if name == "t5" else {}
    model(input_ids=IDS, **more)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for refused in (lambda: model(input_ids=IDS, **more), lambda: bank.save("it", "nowhere"), lambda: bank.merge("it")):
        with pytest.raises(UsageError, match=rf"had the shape \(48, 16\) .* has \({rows}, 16\) now"):
            refused()
    bank.set(None)
    model(input_ids=IDS, **more)
    bank.detach()
    again = inlay.attach(model)
    again.add("it", method, seed=0)
    again.set("it")
    model(input_ids=IDS, **more)


def test_a_replaced_module_is_named():
    bank = attached(inlay.LoRA(r=2))
    block = bank.model.model.layers[1]
    block.mlp.up_proj = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    with bank.route(["it"]), pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj was replaced"):
        bank.model(input_ids=IDS)
    with pytest.raises(UsageError, match="was replaced"):
        bank.add("more", inlay.LoRA(r=2))


# ---- caches and masks of others' making

MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
METHODS = {
    "lora": inlay.LoRA(r=2),
    "prefix": inlay.PrefixTuning(num_virtual_tokens=3),
    "prompt": inlay.PromptTuning(num_virtual_tokens=3),
    "loreft": inlay.LoReFT(r=2, prefix_positions=1, suffix_positions=1, dropout=0.0),
}


def scores(bank, rows, prompts=None, **more):
    """Of six tokens written for two rows, the second of which is padded."""
    with bank.route(rows, prompts=prompts):
        out = bank.model.generate(
            input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True, **more,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [["it", "it"], ["it", None], [None, "it"]])
def test_a_static_cache_gives_what_a_growing_one_gives(name, method, rows):
    bank = attached(METHODS[method], name)
    expected = scores(bank, rows)
    assert not torch.allclose(expected, scores(bank, [None, None]))
    for _ in range(2):  # transformers keeps the cache for the next call
        torch.testing.assert_close(scores(bank, rows, cache_implementation="static"), expected)


def test_a_static_cache_without_room_for_virtual_tokens_is_named():
    bank = attached(METHODS["prompt"])
    config = bank.model.config
    cache = transformers.StaticCache(config=config, max_cache_len=7)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=4, dtype=torch.float64, device="cpu")
    with bank.route(["it", "it"]), pytest.raises(UsageError, match="room for 7 tokens, and 8 come with 3 virtual"):
        bank.model(input_ids=IDS, attention_mask=MASK, past_key_values=cache)


def test_sliding_masks_that_generate_makes_for_a_static_cache_are_named():
    bank = attached(METHODS["prefix"], "mistral")
    with pytest.raises(UsageError, match=r"need the attention mask \(rows, tokens\)"):
        scores(bank, ["it", "it"], cache_implementation="static")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_four_dimensions_is_read_where_it_says_no_more_than_two(method, dtype):
    bank = attached(METHODS[method])
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & MASK[:, None, None].bool()
    causal |= ~MASK[:, None, :, None].bool()  # padding sees all: a softmax over nothing is no number
    apart = causal.clone()
    apart[0, 0, 3:, :3] = False  # two texts in one row
    if dtype != torch.bool:
        causal, apart = (torch.zeros(2, 1, 5, 5, dtype=dtype).masked_fill(~m, -1e30) for m in (causal, apart))
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    with bank.route(["it", "it"]):
        expected = bank.model(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
        found = bank.model(input_ids=IDS, attention_mask=causal, position_ids=positions).logits
        torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()])
        if method == "lora":
            bank.model(input_ids=IDS, attention_mask=apart)
        else:
            with pytest.raises(UsageError, match=r"it is \(2, 1, 5, 5\), and says more"):
                bank.model(input_ids=IDS, attention_mask=apart)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_prompt_in_chunks_gives_what_it_gives_as_a_whole(method, size):
    bank = attached(METHODS[method])
    rows = ["it", "it"]
    expected = scores(bank, rows)
    if method == "prompt" and size == 2:  # the padded row's first chunk is padding
        with pytest.raises(UsageError, match="padding alone"):
            scores(bank, rows, prefill_chunk_size=size)
        return
    if method == "loreft":
        with pytest.raises(UsageError, match="the end of a prompt cannot be told"):
            scores(bank, rows, prefill_chunk_size=size)
        torch.testing.assert_close(scores(bank, rows, prompts=[5, 3], prefill_chunk_size=size), expected)
        return
    torch.testing.assert_close(scores(bank, rows, prefill_chunk_size=size), expected)


def test_rows_that_hold_several_texts_have_no_positions():
    bank = attached(METHODS["loreft"])
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with bank.route(["it"]), pytest.raises(UsageError, match="packed rows"):
        bank.model(input_ids=IDS[:1], position_ids=packed)


@pytest.mark.parametrize("method", METHODS)
def test_continuous_batching_takes_lora_and_names_what_it_cannot(method, monkeypatch):
    bank = attached(METHODS[method])
    bank.model.float()
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    kind = transformers.generation.configuration_utils.ContinuousBatchingConfig
    page = "page_size" if "page_size" in inspect.signature(kind).parameters else "block_size"  # its earlier name
    small = kind(num_blocks=8, max_batch_tokens=16, **{page: 32})
    prompts = [IDS[0].tolist(), IDS[1, 2:].tolist()]
    bank.set("it")
    expected = []
    for prompt in prompts:
        own = torch.tensor([prompt])
        out = bank.model.generate(own, attention_mask=torch.ones_like(own), generation_config=settings)
        expected.append(out[0, len(prompt) :].tolist())
    errors = []
    check = UsageError.__init__
    monkeypatch.setattr(UsageError, "__init__", lambda self, *args: (errors.append(args[0]), check(self, *args))[1])
    made = bank.model.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    found = [one.generated_tokens for one in made.values()]
    if method == "lora":
        assert found == expected and not errors
    else:
        assert any("packed rows, such as of" in error for error in errors) and not any(found)


# ---- quantized bases


def quantized(kind, folder):
    """A tiny base whose linear layers have int8 weights."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = make("llama", dtype=torch.float32)
        quantize_(model.model, Int8WeightOnlyConfig())
        return model
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_beside_an_int8_base_are_those_of_peft(kind, dora, tmp_path):
    pytest.importorskip(kind)
    if kind == "bitsandbytes":
        make("llama", dtype=torch.float32).save_pretrained(tmp_path)
    targets = ["q_proj", "v_proj", "down_proj", "gate_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora)
    try:
        theirs = peft.get_peft_model(quantized(kind, tmp_path), config)
    except (TypeError, ValueError, NotImplementedError):  # peft has no DoRA beside torchao's weights
        assert (kind, dora) == ("torchao", True)
        theirs = None
    bank = inlay.attach(quantized(kind, tmp_path))
    bank.add("it", (inlay.DoRA if dora else inlay.LoRA)(r=4, alpha=8, targets=targets), seed=0)
    bank.set("it")
    if theirs is None:
        expected = bank.model(input_ids=IDS, labels=IDS).loss
        bank.set(None)
        torch.testing.assert_close(bank.model(input_ids=IDS, labels=IDS).loss, expected)  # DoRA begins as the base
        expected.backward()
        assert all(bool(p.grad.isfinite().all()) for p in bank.parameters("it"))
        return
    stored = dict(theirs.named_parameters())
    torch.manual_seed(5)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    pairs = []
    with torch.no_grad():
        for path, own in bank.adapters["it"].params.items():
            for key, parameter in own.items():
                other = stored[f"base_model.model.{path}.{names[key]}"]
                parameter.add_(torch.randn_like(parameter) * 0.1)
                other.copy_(parameter.view_as(other))
                pairs.append((parameter, other))
    for model in (theirs, bank.model):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, other in pairs:
        torch.testing.assert_close(parameter.grad, other.grad.view_as(parameter), rtol=2e-3, atol=2e-5)


def test_a_quantized_base_without_gradients_is_named():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = make("llama", dtype=torch.float32)
    quantize_(model.model, Int8DynamicActivationInt8WeightConfig())
    bank = inlay.attach(model)
    bank.add("it", inlay.LoRA(r=2), seed=0)
    bank.set("it")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"q_proj is quantized \(Int8Tensor\) so that no gradient flows"):
            model(input_ids=IDS)
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())
