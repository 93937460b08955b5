"""Tiny configurations, made by rules from a configuration class and its defaults.

The rules know the words of fields (`hidden_size`, `num_layers`), not families. What they miss is in `hints.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .hints import HINTS, NESTED

__all__ = ["WIDTH", "shrink", "tiny_config"]

WIDTH, HEADS, HEAD_DIM, FFN, VOCABULARY, POSITIONS = 32, 4, 8, 48, 128, 64
FIRST_SPECIAL = VOCABULARY - 1
"""Placeholders of images and sounds have ids from here downwards, an id for each name."""

Rule = tuple[str, Callable[[int], Any]]
RULES: tuple[Rule, ...] = (
    (r"(^|_)vocab_size$|^vocab_size_.*|^(n_|num_)?vocab$|^vocab_sizes?$", lambda v: VOCABULARY),
    (r"max_.*position|^n_positions$|^max_(seq|sequence)_len|^n_ctx$|max_target_positions", lambda v: POSITIONS),
    (r"max_source_positions", lambda v: 8),
    (r"(^|_)(image|crop|img)_size$", lambda v: 16),
    (r"^(patch_size|spatial_patch_size)$", lambda v: 4),
    (r"kv_heads$|key_value_heads|^n_head_kv$|num_key_heads$|num_kv_heads", lambda v: 2 if v > 1 else v),
    (r"^qk_head_dim", lambda v: 2 * HEAD_DIM),
    (r"(qk_rope|qk_nope|v|index|key|value)_head_dim$", lambda v: HEAD_DIM),
    (r"head_dim$|^d_kv$|head_size$|headdim$|^d_head$|dim_head$", lambda v: HEAD_DIM),
    (r"heads$|^n_head$|^encoder_heads$|heads_per|^n_heads$|num_query_groups", lambda v: HEADS),
    (r"^n_layers?$|_layers$|^depth$|_depth$", lambda v: min(v, 2)),
    (r"(q|kv|o)_lora_rank|_rank$|low_rank", lambda v: min(v, 8)),
    (r"experts_per_tok|top_?k|^moe_k$|num_selected", lambda v: min(v, 2)),
    (r"(n|num)_group$", lambda v: min(v, 2)),
    (r"experts$|^num_experts|moe_num_experts|expert_num", lambda v: min(v, 4)),
    (r"intermediate_size|ffn_dim|^d_ff$|ffn_hidden|^n_inner$|mlp_dim|mlp_hidden|feed_forward_size|expert_dim",
     lambda v: FFN),
    (r"hidden_size|^d_model$|^n_embd$|^dim$|embedding_size$|embed_proj_dim|projection_dim|^hidden_dim$|lru_width"
     r"|proj_size$|output_dim$|pooler_output_size|^d_embed|_hidden_dim$|emb_dim$|embed_dim$", lambda v: WIDTH),
    (r"sliding_window|window_size$|attention_window", lambda v: 4),
    (r"(d_)?state_size|d_state$|_state_dim", lambda v: 8),
    (r"n_mels|mel_bins$|^feature_size$|feat_per_channel|input_feat_size", lambda v: 8),
    (r"chunk_size$|block_size$|chunk_length", lambda v: min(v, 8)),
    (r"conv_pos_embeddings$", lambda v: 4),
    (r"conv_pos_embedding_groups$", lambda v: 2),
    (r"num_(latents|query_tokens|queries|landmarks|codevectors)", lambda v: min(v, 4)),
    (r"channels$|base_width|num_filters", lambda v: v if v <= 4 else 8),
    (r"spatial_merge_size|temporal_patch_size|num_channels|in_channels|in_chans", lambda v: v),
)  # fmt: skip
IDS = re.compile(r"(token_id|token_index|token_ids|_id|_idx|_token)$")
KEPT_IDS = re.compile(r"^(pad|bos|eos|decoder_start)_token_id$|^layer|sep_token|cls_token")
DROPOUT = re.compile(r"drop|layerdrop|attn_pdrop|mask_time_prob|mask_feature_prob|jitter")


def tiny_config(kind: Any, type_name: str, **more: Any) -> PreTrainedConfig:
    """A configuration of class `kind` whose model is a few thousand numbers; `more` are fields that are set."""
    return shrink(kind, {**HINTS.get(type_name, {}), **more}, {})


def shrink(kind: Any, hints: Mapping[str, Any], ids: dict[str, int]) -> PreTrainedConfig:
    """`ids` holds the ids given to names of special tokens so far: a name has one id in all parts of a model.

    A hint whose key has a dot, "text_config.num_layers", is for a part.
    """
    own = {**NESTED.get(kind.__name__, {}), **{k: v for k, v in hints.items() if "." not in k}}
    default = _default(kind, own)
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    parts = {name: value for name, value in fields.items() if isinstance(value, PreTrainedConfig)}
    made: dict[str, Any] = {}
    for name, value in parts.items():
        if name in kind.sub_configs or not kind.sub_configs:
            inner = {key.split(".", 1)[1]: v for key, v in hints.items() if key.startswith(f"{name}.")}
            made[name] = shrink(type(value), inner, ids)
    chosen = layers_to_keep(fields)
    for name, value in fields.items():
        if name not in parts and name not in SKIPPED and (new := _shrunk(name, value, chosen, ids)) is not value:
            made[name] = new
    if "mrope_section" in getattr(kind, "ignore_keys_at_rope_validation", ()):
        usual = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        made["rope_parameters"] = _rope({**usual, **(fields.get("rope_parameters") or {})})
    if "fullatt_block_indexes" in fields:
        made["window_size"] = 16  # in pixels: two by two merged patches
    for name in ("vision_config", "audio_config"):
        part = kind.sub_configs.get(name)
        if name in fields and fields[name] is None and isinstance(part, type) and issubclass(part, PreTrainedConfig):
            made[name] = shrink(part, {}, ids) if not issubclass(part, AutoConfig) else None
    for name, value in MISSING.items():  # what the class leaves to a checkpoint's file
        if name in fields and fields[name] is None:
            made[name] = value
    if "kv_lora_rank" in fields and isinstance(made.get("num_key_value_heads"), int):
        made["num_key_value_heads"] = HEADS  # latent attention has keys for all heads
    if any("expert" in name for name in fields):
        made["experts_implementation"] = "eager"  # on CPUs the grouped product knows no float64
    made |= own
    return kind(**{name: value for name, value in made.items() if value is not DROP})


MISSING = {"vocab_size": VOCABULARY, "head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
DROP = object()
SKIPPED = frozenset({"transformers_version", "architectures", "id2label", "label2id", "dtype", "model_type"})


def _default(kind: type[PreTrainedConfig], own: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return kind()
    except Exception:  # a class whose defaults do not fit one another
        return kind(**own)


def layers_to_keep(fields: Mapping[str, Any]) -> tuple[int, list[int]]:
    """How many layers the default has, and which of them are kept: two, or one of each kind where lists say kinds."""
    count = next((fields[n] for n in LAYER_COUNTS if isinstance(fields.get(n), int)), 0)
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count]
    kinds = [repr([entry[i] for entry in lists]) if lists else "" for i in range(count)]
    chosen = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    for i in range(count):
        if len(chosen) >= 2:
            break
        if i not in chosen:
            chosen.append(i)
    return count, sorted(chosen)


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")


def _shrunk(name: str, value: Any, chosen: tuple[int, list[int]], ids: dict[str, int]) -> Any:
    count, kept = chosen
    if isinstance(value, bool) or value is None:
        return value
    if DROPOUT.search(name) and isinstance(value, float):
        return 0.0
    if isinstance(value, (list, tuple)):
        return _shrunk_list(name, value, count, kept, ids)
    if isinstance(value, dict) and name.startswith("rope"):
        return _rope(value)
    if not isinstance(value, int):
        return value
    if name in LAYER_COUNTS and value == count and kept:
        return len(kept)
    if IDS.search(name):
        return _id(name, value, ids)
    for pattern, rule in RULES:
        if re.search(pattern, name):
            return rule(value) if value > 0 else value
    return value


def _shrunk_list(name: str, value: Sequence[Any], count: int, kept: list[int], ids: dict[str, int]) -> Any:
    if IDS.search(name) and all(isinstance(v, int) for v in value):
        return _like(value, [_id(f"{name}.{i}", v, ids) for i, v in enumerate(value)])
    if name in CONVOLUTIONS and len(value) > 2:
        return CONVOLUTIONS[name]
    if count and len(value) == count and kept and (PER_LAYER.search(name) or not SIZES.search(name)):
        return _like(value, [_shrunk(name, value[i], (0, []), ids) for i in kept])
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        for pattern, rule in LISTS:
            if re.search(pattern, name):
                return _like(value, [rule(v) for v in value])
    return value


def _like(value: Sequence[Any], items: Iterable[Any]) -> Sequence[Any]:
    return tuple(items) if isinstance(value, tuple) else list(items)


CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2)}
"""The first layers of models of sound waves: two of them."""
PER_LAYER = re.compile(r"per_layer|layer_types")
SIZES = re.compile(r"hidden_sizes|embed_dim|depth|heads|channels|dims$|kernel|stride|patch")
LISTS: tuple[Rule, ...] = (
    (r"^depths$|num_blocks$|^block_repeats$|layers_per|numb_of_layers", lambda v: 1),
    (r"heads$", lambda v: min(v, 2)),
    (r"hidden_sizes|embed_dim|channels$|_dims$|^dim_embed$", lambda v: 8 * max(1, min(4, v // 64))),
    (r"_indexes$|_indices$|_layers$|_layer$", lambda v: 0),
)  # fmt: skip


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings for HEAD_DIM: three sections of its half, where images have them."""
    new = {k: _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    if "mrope_section" in new:
        new["mrope_section"] = [2, 1, 1]
        if "partial_rotary_factor" in new:
            new["partial_rotary_factor"] = 1.0
    return new


def _id(name: str, value: int, ids: dict[str, int]) -> int:
    """An id below the vocabulary's size: small ones stay."""
    if value < 64:
        return value
    if KEPT_IDS.search(name):
        return {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], 3)
    return ids.setdefault(re.sub(r"_(index|id|token_id|token_index)$", "", name), FIRST_SPECIAL - len(ids))
