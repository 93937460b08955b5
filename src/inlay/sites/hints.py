"""What structure alone cannot say: the names model families give to the same thing. The only file that knows them.

Everything here is a set of module names. An architecture that uses none of them still works: its projections
are found by their kind and place, and only the short cuts by role (`qv`, `qkv`) need a name from here.
"""

from __future__ import annotations

import re

__all__ = [
    "CACHES",
    "CACHE_LENGTHS",
    "CROSS_ATTENTION",
    "FUSED_EXPERTS",
    "HEADS",
    "IS_ATTENTION",
    "ROLES",
    "is_key_norm",
    "role_of",
]

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q", "q_lin", "wq", "query_proj", "q_b_proj", "to_q"),
    "k": ("k_proj", "key", "k", "k_lin", "wk", "key_proj", "to_k"),
    "v": ("v_proj", "value", "v", "v_lin", "wv", "value_proj", "to_v"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj", "att_proj"),
    "o": ("o_proj", "out_proj", "o", "out_lin", "wo", "dense", "c_proj", "Wo", "to_out", "attn_out"),
}
"""Projection names inside an attention module, by role."""

HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|cls|predictions|pooler|output_layer|"
    r"classification_head|output_projection|proj_out)(\.|$)"
)
"""Parts behind the last block: `all-linear` leaves them alone, as PEFT does with output layers."""

CACHES = ("past_key_values", "cache", "cache_params")
"""What stacks call the keys and values, or the state, that they are given and hand back."""

CACHE_LENGTHS = frozenset({"cache_length", "past_key_values_length"})
"""What tables of positions call the number of tokens before those that they are asked for."""

CROSS_ATTENTION = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
"""Attention from a decoder to its encoder."""

IS_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
"""Class or attribute names of attention modules."""

KEY_NORM = re.compile(r"(k|key)_?(layer)?norm")
"""Norms of keys inside an attention module."""

FUSED_EXPERTS = ("experts",)
"""Children that hold a mixture's experts: the module around them is the MLP's output."""


def is_key_norm(name: str) -> bool:
    """Whether `name` is that of the norm of an attention module's keys."""
    return KEY_NORM.fullmatch(name) is not None


def role_of(name: str) -> str:
    """The role of an attention projection called `name`, or "" where the name is not known."""
    return next((role for role, names in ROLES.items() if name in names), "")
