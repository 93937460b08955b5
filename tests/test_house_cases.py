"""Kinds of faults that were seen in bases of many families: each is right, or refused by a sentence that is true."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from peft import PeftModel
from transformers import DynamicCache

import inlay
from inlay.errors import UsageError
from zoo import BART, ENCODER, IMAGES, make, small

IMAGE = 47
LORA = inlay.LoRA(r=2)
MROPE = {"type": "mrope", "mrope_section": [1, 1, 0], "rope_type": "default"}
GRIDS = [[(1, 4, 4), (1, 2, 4)], [], [(1, 4, 2)]]
"""Frames, height and width in patches of the images of three rows."""


def qwen2_vl() -> Any:
    vision = dict(
        depth=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3, embed_dim=16, hidden_size=16,
        num_heads=2, mlp_ratio=2,
    )  # fmt: skip
    config = tf.Qwen2VLConfig(
        text_config=small(rope_scaling=MROPE, rope_theta=10000.0), vision_config=vision, image_token_id=IMAGE,
        video_token_id=46, vision_start_token_id=45, vision_end_token_id=44,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


def idefics3() -> Any:
    vision = {**IMAGES, "image_size": 16}
    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            text_config=tf.LlamaConfig(**small()), vision_config=vision, scale_factor=2, image_token_id=IMAGE
        )
    )


def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=small(head_dim=4, sliding_window=16, layer_types=layers),
            mm_tokens_per_image=4,
            vision_config={**IMAGES, "vision_use_head": False},
            image_token_index=IMAGE,
            boi_token_index=45,
            eoi_token_index=44,
        )
    )


def qwen2_audio() -> Any:
    sound = dict(d_model=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24, num_mel_bins=8)
    config = tf.Qwen2AudioConfig(
        text_config=small(model_type="qwen2"), audio_config={**sound, "max_source_positions": 8},
        audio_token_index=IMAGE,
    )  # fmt: skip
    return tf.Qwen2AudioForConditionalGeneration(config)


BERT = {**ENCODER, "num_labels": 3}
OTHERS = {
    "gemma3_images": gemma3, "qwen2_vl": qwen2_vl, "idefics3": idefics3, "qwen2_audio": qwen2_audio,
    "fsmt": lambda: tf.FSMTForConditionalGeneration(
        tf.FSMTConfig(
            langs=["en", "de"], src_vocab_size=48, tgt_vocab_size=48, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_position_embeddings=64,
        )
    ),
    "roformer": lambda: tf.RoFormerForMaskedLM(tf.RoFormerConfig(**ENCODER)),
    "deberta": lambda: tf.DebertaForMaskedLM(
        tf.DebertaConfig(
            **ENCODER, relative_attention=True, max_relative_positions=16, pos_att_type=["p2c", "c2p"],
            type_vocab_size=0,
        )
    ),
    "swin": lambda: tf.SwinForImageClassification(
        tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "encoder_decoder": lambda: tf.EncoderDecoderModel(
        tf.EncoderDecoderConfig.from_encoder_decoder_configs(
            tf.BertConfig(**ENCODER), tf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
        )
    ),
    "led": lambda: tf.LEDForConditionalGeneration(
        tf.LEDConfig(
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, attention_window=8,
            max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
        )
    ),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=48, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]], window_size=8,
        )
    ),
    "mpt": lambda: tf.MptForCausalLM(
        tf.MptConfig(vocab_size=48, d_model=16, n_layers=2, n_heads=4, max_seq_len=64)
    ),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=True, bias=False,
            new_decoder_architecture=False, parallel_attn=True,
        )
    ),
    "doge": lambda: tf.DogeForCausalLM(tf.DogeConfig(**small())),
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **small(
                num_hidden_layers=3, num_key_value_heads=1, lru_width=16, attention_window_size=16,
                block_types=["recurrent", "recurrent", "attention"],
            )
        )
    ),
    "mobilebert": lambda: tf.MobileBertForMaskedLM(
        tf.MobileBertConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            embedding_size=8, intra_bottleneck_size=8, max_position_embeddings=64, true_hidden_size=8,
        )
    ),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=3,
            expert_capacity=64, dropout_rate=0.0, router_jitter_noise=0.0, num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1, decoder_start_token_id=0,
        )
    ),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=48, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    ),
    "bert_sequences": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "bert_tokens": lambda: tf.BertForTokenClassification(tf.BertConfig(**BERT)),
}  # fmt: skip


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    if name not in OTHERS:
        return make(name, dtype=dtype)
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1) if parameter.ndim == 1 else parameter.mul_(4)
    return model.to(dtype)


def bank_with(model: Any, **methods: Any) -> inlay.Bank:
    """A bank whose adapters are no longer at their start."""
    bank = inlay.attach(model)
    for number, (name, method) in enumerate(methods.items()):
        bank.add(name, method, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in bank.adapters[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return bank


def poison(bank: inlay.Bank, name: str) -> None:
    with torch.no_grad():
        for parameter in bank.adapters[name].parameters():
            parameter.fill_(float("nan"))


@torch.no_grad()
def rows_are_as_alone(bank: inlay.Bank, route: Any, batch: Any, one: Any, bad: str = "", tol: float = 1e-9) -> None:
    """Logits of `batch()` are, row by row, those of `one(i)`; adapters do something there."""
    model: Any = bank.model
    with bank.route(route):
        out = model(**batch()).logits
    for i, row in enumerate(route):
        if row == bad:
            continue
        with bank.route([row]):
            expected = model(**one(i)).logits[0]
        torch.testing.assert_close(out[i, : len(expected)] if out.ndim > 2 else out[i], expected, atol=tol, rtol=tol)
        with bank.route([None]):
            assert (row is None) == torch.equal(model(**one(i)).logits[0], expected)


def texts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


# ---- images and sounds


class Seeing:
    """Rows of text with images or sounds: `batch` of all rows, `one` of row i."""

    def __init__(self, name: str) -> None:
        self.name, generator = name, torch.Generator().manual_seed(1)
        self.items: list[list[Any]] = []
        rows = []
        counts = {"qwen2_vl": GRIDS, "qwen2_audio": [[16], [], [8, 12]]}.get(name, [[1, 1], [], [1]])
        for number, items in enumerate(counts):
            row = [5 + number, 9, 21]
            for item in items:
                row += [IMAGE] * self.tokens(item) + [11 + number, 4]
            rows.append(row)
            shape = {"qwen2_audio": (1, 8, 16), "idefics3": (1, 3, 16, 16)}.get(name, (1, 3, 8, 8))
            shapes = [(item[0] * item[1] * item[2], 96) if name == "qwen2_vl" else shape for item in items]
            made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            self.items.append(list(zip(items, made, strict=True)))
        self.ids, self.mask = texts(rows)

    def tokens(self, item: Any) -> int:
        if self.name == "qwen2_vl":
            return item[0] * item[1] * item[2] // 4
        return ((item - 1) // 2 + 1 - 2) // 2 + 1 if self.name == "qwen2_audio" else 4

    def batch(self, rows: Any = (0, 1, 2)) -> dict[str, Any]:
        length = int(self.mask[list(rows)].sum(1).max())
        ids, mask = self.ids[list(rows), :length], self.mask[list(rows), :length]
        items = [item for row in rows for item in self.items[row]]
        given = {"input_ids": ids, "attention_mask": mask}
        if self.name in ("qwen2_vl", "gemma3_images"):
            given["mm_token_type_ids" if self.name == "qwen2_vl" else "token_type_ids"] = (ids == IMAGE).int()
        if not items:
            return given
        values = torch.cat([value for _, value in items])
        if self.name == "qwen2_vl":
            return {**given, "pixel_values": values, "image_grid_thw": torch.tensor([grid for grid, _ in items])}
        if self.name == "qwen2_audio":
            frames = torch.tensor([[n] for n, _ in items])
            seen = (torch.arange(16)[None] < frames).long()
            return {**given, "input_features": values, "feature_attention_mask": seen}
        if self.name == "idefics3":
            most = max(len(self.items[row]) for row in rows)
            values = torch.zeros(len(rows), most, 3, 16, 16, dtype=torch.float64)
            for place, row in enumerate(rows):
                for number, (_, value) in enumerate(self.items[row]):
                    values[place, number] = value[0]
        return {**given, "pixel_values": values}

    def one(self, row: int) -> dict[str, Any]:
        return self.batch((row,))


SEEING = ["llava", "gemma3_images", "qwen2_vl", "idefics3", "qwen2_audio"]


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("method", [LORA, inlay.NormTuning(), inlay.LoReFT(r=2)], ids=["lora", "norm", "reft"])
def test_rows_with_images_in_towers_are_as_alone(name, method):
    """Two images, none and one: each is its own row's in the tower and the projector too."""
    seeing = Seeing(name)
    bank = bank_with(model_of(name), a=method, b=inlay.LoRA(r=3))
    rows_are_as_alone(bank, ["a", None, "b"], seeing.batch, seeing.one)


@pytest.mark.parametrize("name", SEEING)
def test_a_diverged_row_poisons_no_image_of_others(name):
    seeing = Seeing(name)
    bank = bank_with(model_of(name), bad=LORA, a=LORA)
    poison(bank, "bad")
    rows_are_as_alone(bank, ["bad", None, "a"], seeing.batch, seeing.one, bad="bad")


@pytest.mark.parametrize("method", [inlay.PrefixTuning(3), inlay.PromptTuning(3), inlay.Houlsby(reduction_factor=4)])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_virtual_tokens_and_bottlenecks_beside_images(name, method):
    """Positions of three planes (time, height, width) move as others do; a bottleneck finds the tower's stream."""
    seeing = Seeing(name)
    bank = bank_with(model_of(name), a=method, b=LORA)
    rows_are_as_alone(bank, ["a", None, "b"], seeing.batch, seeing.one)
    rows_are_as_alone(bank, ["b", "a", None], seeing.batch, seeing.one)


def test_a_mask_that_the_model_makes_of_images_has_no_place_for_prefixes():
    seeing = Seeing("gemma3_images")
    bank = bank_with(model_of("gemma3_images"), a=inlay.PrefixTuning(3))
    with pytest.raises(UsageError, match="which says more"), bank.route(["a", None, "a"]):
        bank.model(**seeing.batch())


@torch.no_grad()
def test_towers_that_run_ahead_of_generation_know_their_rows():
    seeing = Seeing("qwen2_vl")
    bank = bank_with(model_of("qwen2_vl"), a=LORA, b=inlay.LoRA(r=3))
    model: Any = bank.model
    told = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for rows in ((0, 2), (2, 0)):
        given = seeing.batch(rows)
        shifts = [int(n) for n in (1 - given["attention_mask"]).sum(1)]  # text is written behind the last column
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            given[name] = torch.stack([v.roll(n) for v, n in zip(given[name], shifts, strict=True)])
        with bank.route(["a", "b"]):
            written = model.generate(**given, **told).logits[0]
        for place, row in enumerate(rows):
            with bank.route([["a", "b"][place]]):
                expected = model(**seeing.one(row)).logits[0, -1]
            torch.testing.assert_close(written[place].double(), expected, atol=1e-5, rtol=1e-5)


def test_images_that_fit_no_row_are_refused():
    seeing = Seeing("llava")
    bank = bank_with(model_of("llava"), a=LORA, text=inlay.LoRA(r=2, targets=r"model\.language_model\..*q_proj"))
    given = seeing.batch()
    given["input_ids"] = torch.where(given["input_ids"] == IMAGE, 46, given["input_ids"])
    given["input_ids"][0, :5], given["input_ids"][1, :7] = IMAGE, IMAGE  # 12 tokens, but no images of equal size
    with (
        pytest.raises(UsageError, match="which image belongs to which row cannot be told"),
        bank.route(["a", None, "a"]),
    ):
        bank.model(**given)
    with torch.no_grad(), bank.route(["text", None, "text"]):  # the towers are nobody's
        assert bank.model(**given).logits.isfinite().all()
    with torch.no_grad(), bank.route(["a", "a", "a"]):  # and here everybody's
        assert bank.model(**given).logits.isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_towers_are_those_of_the_row_alone(recompute):
    seeing = Seeing("llava")
    bank = bank_with(model_of("llava"), a=LORA, b=inlay.LoRA(r=3))

    def gradients(name, route, given):
        for parameter in bank.adapters[name].parameters():
            parameter.grad = None
        with bank.route(route):
            logits = bank.model(**given).logits[0 if len(route) == 1 else route.index(name)]
        logits[: int(seeing.mask[0].sum())].square().sum().backward()  # outside of the route
        return [p.grad.clone() for p in bank.adapters[name].parameters() if p.grad is not None]

    alone = gradients("a", ["a"], seeing.one(0))
    if recompute:
        with bank.recomputing():
            mixed = gradients("a", ["a", None, "b"], seeing.batch())
    else:
        mixed = gradients("a", ["a", None, "b"], seeing.batch())
    assert len(alone) == len(mixed) > 20
    for expected, got in zip(alone, mixed, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("side", ["text_embeds", "image_embeds"])
def test_images_beside_texts_have_positions_of_their_own(side):
    """CLIP holds as many images as texts: a tower's tokens are not counted by the text's mask."""
    bank = bank_with(model_of("clip"), a=inlay.LoReFT(r=2), b=LORA)
    ids, mask = texts([[5, 9, 22, 31, 2], [8, 2], [7, 6, 2]])
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        with bank.route(["a", None, "b"]):
            out = bank.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)[side]
        for i, row in enumerate(["a", None, "b"]):
            with bank.route([row]):
                length = int(mask[i].sum()) if side == "text_embeds" else 5
                one = {"input_ids": ids[i : i + 1, :length], "attention_mask": mask[i : i + 1, :length]}
                expected = bank.model(**one, pixel_values=pixels[i : i + 1])[side]
            torch.testing.assert_close(out[i], expected[0])


# ---- rows that lie otherwise, and what all rows share


IDS, MASK = texts([[5, 9, 22, 31, 7, 13, 40], [8, 19, 3, 4], [6, 30, 12, 11, 17]])
DECODER = torch.tensor([[3, 5, 9, 4]] * 3)


@pytest.mark.parametrize("name", ["longformer", "fsmt", "encoder_decoder", "led"])
@pytest.mark.parametrize("method", [LORA, inlay.IA3()], ids=["lora", "ia3"])
def test_rows_in_the_second_dimension_are_as_alone(name, method):
    if name == "fsmt" and Version(tf.__version__) < Version("5.24"):
        pytest.skip("earlier releases cut all tokens but the last behind the decoder's beginning, which is refused")
    bank = bank_with(model_of(name), a=method, b=inlay.LoRA(r=3))
    more = {} if name == "longformer" else {"decoder_input_ids": DECODER}
    ids = torch.where(MASK == 0, bank.model.config.pad_token_id or 1, IDS)

    def one(i: int) -> Any:
        kept = MASK[i].bool()
        given = {"input_ids": ids[i : i + 1, kept], "attention_mask": MASK[i : i + 1, kept]}
        return {**given, **{name: value[i : i + 1] for name, value in more.items()}}

    rows_are_as_alone(bank, ["a", None, "b"], lambda: {"input_ids": ids, "attention_mask": MASK, **more}, one, tol=1e-7)


def test_gradients_of_rows_in_the_second_dimension():
    bank = bank_with(model_of("longformer"), a=LORA, b=inlay.LoRA(r=3))
    ids = torch.where(MASK == 0, 1, IDS)

    def gradients(route, ids, mask):
        for parameter in bank.adapters["a"].parameters():
            parameter.grad = None
        with bank.route(route):
            bank.model(input_ids=ids, attention_mask=mask).logits[0, :7].square().sum().backward()
        return [p.grad.clone() for p in bank.adapters["a"].parameters() if p.grad is not None]

    alone, mixed = gradients(["a"], ids[:1], MASK[:1]), gradients(["a", None, "b"], ids, MASK)
    for expected, got in zip(alone, mixed, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)


def test_windows_of_rows_are_as_alone():
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    bank = bank_with(model_of("swin"), a=LORA, b=inlay.LoRA(r=3))
    assert bank.base.observed.whole_rows
    rows_are_as_alone(
        bank, ["a", None, "b"], lambda: {"pixel_values": pixels}, lambda i: {"pixel_values": pixels[i : i + 1]}
    )


def test_what_all_rows_share_takes_one_adapter_alone():
    """DeBERTa projects its relative positions once for all rows."""
    bank = bank_with(model_of("deberta"), a=LORA, b=LORA)

    def one(i: int) -> Any:
        kept = MASK[i].bool()
        return {"input_ids": IDS[i : i + 1, kept], "attention_mask": MASK[i : i + 1, kept]}

    rows_are_as_alone(bank, ["a"] * 3, lambda: {"input_ids": IDS, "attention_mask": MASK}, one)
    said = r"cannot be told what belongs to which of 3 rows.*leave \w+ out"
    with pytest.raises(UsageError, match=said), bank.route(["a", None, "b"]):
        bank.model(input_ids=IDS, attention_mask=MASK)


def test_tokens_that_an_expert_is_given_are_no_rows():
    """Of each row as many as chose the expert: three of three rows need not be one of each."""
    bank = bank_with(model_of("switch"), a=LORA, b=inlay.LoRA(r=2, targets="attention"))
    ids = torch.tensor([[5, 9], [22, 31], [7, 13]])
    given = {"input_ids": ids, "decoder_input_ids": ids}
    with pytest.raises(UsageError, match="cannot be told what belongs"), bank.route(["a", None, None]):
        bank.model(**given)
    rows_are_as_alone(bank, ["b", None, "b"], lambda: given, lambda i: {k: v[i : i + 1] for k, v in given.items()})
    rows_are_as_alone(bank, ["a"] * 3, lambda: given, lambda i: {k: v[i : i + 1] for k, v in given.items()})


# ---- positions and padding


@pytest.mark.parametrize("name", ["bart", "pegasus", "fsmt", "led"])
def test_prefixes_of_decoders_have_the_references_positions(name, tmp_path):
    model = model_of(name)
    bank = bank_with(model, a=inlay.PrefixTuning(3))
    bank.save("a", tmp_path)
    given = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "decoder_input_ids": DECODER[:1]}
    with torch.no_grad():
        with bank.route(["a"]):
            ours = model(**given).logits
        bank.detach()
        theirs = PeftModel.from_pretrained(model, str(tmp_path)).to(model.dtype)(**given).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bart", "led"])
def test_prefixes_of_unequal_length_move_each_row_by_its_own(name):
    bank = bank_with(model_of(name), a=inlay.PrefixTuning(3), b=inlay.PrefixTuning(2))
    given = {"input_ids": IDS[:1].expand(3, -1), "decoder_input_ids": DECODER}
    rows_are_as_alone(
        bank, ["a", None, "b"], lambda: given, lambda i: {k: v[i : i + 1] for k, v in given.items()}, tol=1e-7
    )


def test_a_base_without_a_mask_takes_prefixes_of_one_length():
    bank = bank_with(model_of("fsmt"), a=inlay.PrefixTuning(3))
    given = {"input_ids": IDS, "decoder_input_ids": DECODER}
    with pytest.raises(UsageError, match="takes no mask"), bank.route(["a", None, "a"]):
        bank.model(**given)
    with bank.route(["a"] * 3):
        assert bank.model(**given).logits.isfinite().all()


@pytest.mark.parametrize("name", ["recurrent_gemma", "mobilebert"])
def test_padding_that_a_base_sees_is_refused(name):
    """New padding stands before a row without virtual tokens: recurrent layers and neighbours' embeddings see it."""
    bank = bank_with(model_of(name, torch.float32), a=inlay.PromptTuning(3))
    with pytest.raises(UsageError, match="does not ignore padding"), bank.route([None, "a"]):
        bank.model(input_ids=IDS[:2, :4])
    with bank.route(["a", "a"]):
        assert bank.model(input_ids=IDS[:2, :4]).logits.isfinite().all()


def test_padding_between_a_prefix_and_its_row_is_refused():
    bank = bank_with(model_of("mpt"), a=inlay.PrefixTuning(3))
    with pytest.raises(UsageError, match="counts the padding between"), bank.route(["a", "a"]):
        bank.model(input_ids=IDS[:2], attention_mask=MASK[:2].flip(1))


@torch.no_grad()
def test_positions_that_a_cache_moves_for_all_rows_alike_take_prefixes_of_one_length():
    """RoFormer turns queries by positions that count the cache, and prefixes by none."""
    bank = bank_with(model_of("roformer"), a=inlay.PrefixTuning(3), b=inlay.PrefixTuning(2))
    given = {"input_ids": IDS, "attention_mask": MASK}

    def one(i: int) -> Any:
        kept = MASK[i].bool()
        return {name: value[i : i + 1, kept] for name, value in given.items()}

    rows_are_as_alone(bank, ["a"] * 3, lambda: given, one, tol=1e-6)
    with pytest.raises(UsageError, match="counts its cache for all rows alike"), bank.route(["a", "a", "b"]):
        bank.model(**given)


# ---- attention of a base's own


@pytest.mark.parametrize("name", ["gpt_neo", "falcon"])
@torch.no_grad()
def test_prefixes_hold_with_and_without_a_cache_and_in_half_precision(name):
    bank = bank_with(model_of(name, torch.float32), a=inlay.PrefixTuning(3))
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK[:1]}
    model: Any = bank.model
    ids = IDS[:1]
    with bank.route(["a"]):
        cached, plain = (model.generate(input_ids=ids, use_cache=use, **told) for use in (True, False))
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert cached.tolist() == plain.tolist() == ids.tolist()
    with bank.route([None]):
        assert model.generate(input_ids=IDS[:1], **told).tolist() != ids.tolist()
    half = bank_with(model_of(name, torch.bfloat16), a=inlay.PrefixTuning(3))
    with half.route(["a"]):
        assert half.model(input_ids=IDS[:1]).logits.isfinite().all()


def test_prefixes_that_checkpoints_would_drop_are_refused():
    bank = bank_with(model_of("gpt_neo"), a=inlay.PrefixTuning(3))
    with pytest.raises(UsageError, match="drops prefixes"), bank.recomputing(), bank.route(["a"]):
        bank.model(input_ids=IDS)


def test_masks_without_a_place_for_prefixes_are_refused():
    bank = bank_with(model_of("doge"), a=inlay.PrefixTuning(3))
    with pytest.raises(UsageError, match="makes masks of its own"), bank.route(["a"] * 3):
        bank.model(input_ids=IDS)


def test_a_chunk_of_padding_has_no_place_for_virtual_tokens():
    bank = bank_with(model_of("llama"), a=inlay.PromptTuning(3))
    ids, mask = IDS[:2].flip(1), MASK[:2].flip(1)
    with pytest.raises(UsageError, match="first columns are padding alone"), bank.route(["a", "a"]):
        bank.model(input_ids=ids[:, :2], attention_mask=mask[:, :2], past_key_values=DynamicCache())


# ---- what each base has, and what is written


@pytest.mark.parametrize("name", ["clip", "fsmt", "wav2vec2"])
def test_bases_without_a_table_of_ids_refuse_prompts(name):
    with pytest.raises(UsageError, match="token ids"):
        inlay.attach(model_of(name)).add("a", inlay.PromptTuning(3))


def test_an_attention_that_is_a_mixture_has_its_bottlenecks():
    bank = bank_with(model_of("jetmoe", torch.float32), a=inlay.Houlsby(reduction_factor=4))
    rows_are_as_alone(
        bank, ["a", None], lambda: {"input_ids": IDS[:2]}, lambda i: {"input_ids": IDS[i : i + 1]}, tol=1e-4
    )


@pytest.mark.parametrize("name", ["bert_sequences", "bert_tokens"])
@pytest.mark.parametrize("method", [LORA, inlay.IA3(), inlay.PrefixTuning(3)], ids=["lora", "ia3", "prefix"])
def test_adapters_without_heads_open_in_peft_on_models_for_classification(name, method, tmp_path):
    model = model_of(name)
    bank = bank_with(model, a=method)
    bank.save("a", tmp_path)
    with torch.no_grad():
        with bank.route(["a"]):
            ours = model(input_ids=IDS[:1]).logits
        bank.detach()
        theirs = PeftModel.from_pretrained(model, str(tmp_path)).to(model.dtype)(input_ids=IDS[:1]).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_merged_base_has_a_fingerprint_of_its_own(tmp_path):
    bank = bank_with(model_of("llama"), a=LORA, b=LORA)
    before = bank.fingerprint
    bank.save("b", tmp_path)
    bank.merge("a")
    assert bank.fingerprint != before
    with pytest.raises(inlay.errors.FormatError, match="another base"):
        bank.load("c", tmp_path)


def test_a_bank_is_not_copied_and_nothing_is_left_on_a_model():
    model = model_of("llava")
    held = [set(vars(module)) for module in model.modules()]
    bank = bank_with(model, a=LORA)
    for way in (copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match="neither copied nor pickled"):
            way(bank)
    with torch.no_grad(), bank.route(["a"]):
        model(input_ids=IDS[:1])
    bank.detach()
    assert [set(vars(module)) for module in model.modules()] == held


def test_blocks_that_are_computed_again_fill_no_cache():
    """GPT-2 looks at the whole model's mode before it leaves its cache out, and the base stays in evaluation mode."""
    bank = bank_with(make("gpt2"), a=LORA)
    ids, found = torch.arange(3, 15)[None], []
    for recompute in (False, True):
        with bank.recomputing() if recompute else nullcontext(), bank.route(["a"]):
            loss = bank.model(ids).logits.square().sum()
            found.append(torch.autograd.grad(loss, list(bank.parameters("a"))))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("llava", "CAUSAL_LM"),
        ("whisper", None),
        ("bert", "FEATURE_EXTRACTION"),
    ],
)
def test_the_kind_of_model_is_one_that_peft_can_run(name, task, tmp_path):
    model = make(name)
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=0)
    bank.save("a", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf8"))["task_type"] == task


def test_a_model_that_embeds_ids_itself_has_padded_rows():
    assert not inlay.attach(make("llava")).packs and inlay.attach(make("llama")).packs


def test_reentrant_checkpoints_keep_the_gradients_of_blocks_whose_inputs_take_none():
    """As those of a tower, whose images take no gradient: torch would drop all that the block's adapters get."""
    model = make("vit")
    bank = bank_with(model, a=inlay.LoRA(r=2))
    pixels, found = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
    for reentrant in (None, True):
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.train()
        with bank.route(["a", "a"]):
            loss = model(pixel_values=pixels).logits.square().sum()
        for parameter in bank.parameters("a"):
            parameter.grad = None
        loss.backward()
        found.append([p.grad.clone() for p in bank.parameters("a")])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_reentrant_checkpoints_end_where_blocks_hand_on_what_the_first_one_gave():
    """WavLM's biases of positions go from block to block by name: torch's reentrant backward would call itself."""
    config = tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
        conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12,
        num_buckets=8,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        final_dropout=0.0, apply_spec_augment=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.WavLMForCTC(config).eval().double()
    bank = bank_with(model, a=inlay.LoRA(r=2))
    sound, found = torch.randn(2, 64, dtype=torch.float64), []
    for reentrant in (None, True):
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
            model.train()
        with bank.route(["a", "a"]):
            loss = model(input_values=sound).logits.square().sum()
        for parameter in bank.parameters("a"):
            parameter.grad = None
        loss.backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in bank.parameters("a")])
    assert any(bool(grad.any()) for grad in found[0])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)


def test_an_encoder_that_its_configuration_gives_a_decoder_is_one_stack():
    config = make("whisper").config
    model = tf.WhisperForAudioClassification(config).eval().double()
    bank = bank_with(model, a=LORA)
    assert [type(stack).__name__ for stack in bank.base.stacks] == ["WhisperEncoder"]
    sound = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, dtype=torch.float64)
    with torch.no_grad():
        with bank.route(["a", None]):
            mixed = model(input_features=sound).logits
        with bank.route(["a"]):
            alone = model(input_features=sound[:1]).logits
        plain = model(input_features=sound).logits
    torch.testing.assert_close(mixed[:1], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed[1:], plain[1:], rtol=0, atol=1e-9)
    assert (mixed[0] - plain[0]).abs().max() > 1e-6


def test_what_all_rows_share_is_refused_to_several_adapters_and_may_be_left_out():
    """Swin V2's biases of positions are computed once for a batch, and shaped for one row."""
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    torch.manual_seed(0)
    model = tf.Swinv2ForImageClassification(tf.Swinv2Config(**sizes, num_labels=3)).eval().double()
    bank, pixels = bank_with(model, a=inlay.LoRA(r=2)), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(UsageError, match=r"leave continuous_position_bias_mlp\.0 out"), bank.route(["a", None]):
            model(pixel_values=pixels)
        with bank.route(["a", "a"]):
            model(pixel_values=pixels)
        bank.add("b", inlay.LoRA(r=2, targets=["query", "key", "value"]), seed=1)
        for parameter in bank.parameters("b"):
            parameter.add_(0.1)
        with bank.route(["b"]):
            alone = model(pixel_values=pixels[:1]).logits
        with bank.route(["b", None]):
            mixed = model(pixel_values=pixels).logits
        plain = model(pixel_values=pixels).logits
    torch.testing.assert_close(mixed, torch.cat([alone, plain[1:]]), rtol=0, atol=1e-9)
    assert (mixed - plain)[0].abs().max() > 1e-6


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_what_an_adapter_adds_to_padding_reaches_no_token_of_a_recurrent_base(name):
    """Such a base makes zeros of padding before its convolutions; a bias would be more than zero there."""
    bank = bank_with(make(name), a=inlay.LoRABias(r=2), b=inlay.PromptTuning(num_virtual_tokens=3))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    ids = torch.arange(3, 9)[None]
    with bank.route(["a"]):
        alone = bank.model(input_ids=ids).logits[0]
    padded, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    padded[0, 3:], padded[1], mask[0, :3] = ids[0], torch.arange(3, 12), 0
    grads = []
    for rows in (["a", None], ["a", "b"]):  # beside virtual tokens there is more padding
        with bank.route(rows):
            out = bank.model(input_ids=padded, attention_mask=mask).logits[0, 3:]
        torch.testing.assert_close(out, alone, rtol=0, atol=1e-6)
        grads.append(torch.autograd.grad(out.square().sum(), list(bank.parameters("a"))))
    own = torch.autograd.grad(alone.square().sum(), list(bank.parameters("a")))
    for found in grads:
        for one, other in zip(found, own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
