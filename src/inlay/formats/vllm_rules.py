"""What vLLM opens as a LoRA adapter: the rules of its loader, as its release 0.33 has them in lora/peft_helper.py,
lora/lora_model.py, lora/utils.py and config/lora.py, and the modules of its models that LoRA can be beside.

Some of what breaks a rule is passed over by vLLM or by its earlier releases without a word, and gives other logits: the
patterns of ranks and alphas, and a module that its model does not have by that name. Such things are named here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RANKS", "RELEASE", "VOCABULARY", "model_refused", "rank_for", "refusals"]

RELEASE = "0.33"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
VOCABULARY = 258048
"""Rows of the largest table of tokens beside whose head vLLM makes room for LoRA."""
PREFIX = "base_model.model."
ENDS = re.compile(r"\.(?:lora_(?:embedding_)?(?P<one>[AB]))(?P<weight>\.weight)?$")

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PLAIN = (*ATTENTION, "mlp.up_proj", "mlp.down_proj")
GATED = (*PLAIN, "mlp.gate_proj")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
TABLES = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class Family:
    """Modules of a model of vLLM that LoRA can be beside: those in a block, and tables of tokens."""

    block: tuple[str, ...]
    tables: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(GATED, TABLES),
    "MistralForCausalLM": Family(GATED),
    "Qwen2ForCausalLM": Family(GATED),
    "Qwen3ForCausalLM": Family(GATED, TABLES),
    "GemmaForCausalLM": Family(GATED),
    "Gemma2ForCausalLM": Family(GATED),
    "Gemma3ForCausalLM": Family(GATED),
    "GraniteForCausalLM": Family(GATED, TABLES),
    "Exaone4ForCausalLM": Family(GATED),
    "CohereForCausalLM": Family(GATED, TABLES[:1]),
    "Phi3ForCausalLM": Family(FUSED, TABLES),
    "ApertusForCausalLM": Family(PLAIN, TABLES),
    "NemotronForCausalLM": Family(PLAIN, TABLES),
    "MixtralForCausalLM": Family(ATTENTION, TABLES),
    "Qwen3MoeForCausalLM": Family(ATTENTION, TABLES),
    "OlmoeForCausalLM": Family(ATTENTION),
}
"""By a base's class; in these, vLLM's modules have the names that transformers gives them. Experts are left out."""
WITHOUT = (
    "GPT2LMHeadModel", "BloomForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "StableLmForCausalLM",
    "DbrxForCausalLM",
)  # fmt: skip
"""Models of vLLM that take no LoRA."""


def model_refused(model: str, vocabulary: int) -> str | None:
    """Why vLLM would not serve LoRA beside a base of the class `model`; None where it does."""
    if model in WITHOUT:
        return f"vLLM {RELEASE} takes no LoRA beside {model}"
    family = FAMILIES.get(model)
    if family is None:
        return f"which modules of {model} vLLM adapts is not known here (it is of {', '.join(sorted(FAMILIES))})"
    if "lm_head" in family.tables and vocabulary > VOCABULARY:
        return f"vLLM {RELEASE} takes LoRA beside {VOCABULARY} tokens at most, and the base has {vocabulary}"
    return None


def rank_for(rank: int) -> int | None:
    """The least `--max-lora-rank` that an adapter of `rank` fits into; None where there is none."""
    return next((most for most in RANKS if most >= rank), None)


def refusals(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: str, vocabulary: int
) -> list[str]:  # fmt: skip
    """What breaks a rule, a sentence each: of an adapter_config.json, the shapes of the tensors by their keys in
    adapter_model.safetensors, the class of the base, and the rows of its table of tokens."""
    found = [*_of_config(config)]
    if (refused := model_refused(model, vocabulary)) is not None:
        return [*found, refused]
    return [*found, *_of_tensors(config, shapes, model, vocabulary)]


FIELDS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "has LoRA alone (peft_type)"),
    "use_dora": ((None, False), "has no DoRA"),
    "lora_bias": ((None, False), "has no bias beside B (lora_bias)"),
    "bias": ((None, "none"), "takes no biases of the base along (bias)"),
    "modules_to_save": ((None, []), "takes no whole modules along but heads of its classifiers (modules_to_save)"),
    "alora_invocation_tokens": ((None, []), "has no aLoRA"),
    "layer_replication": ((None, []), "has no layer_replication"),
    "use_bdlora": ((None, {}, False), "has no block-diagonal LoRA"),
    "use_qalora": ((None, False), "has no QA-LoRA"),
    "rank_pattern": ((None, {}), "knew no rank_pattern in earlier releases, and passed over it"),
    "alpha_pattern": ((None, {}), "knew no alpha_pattern in earlier releases, and passed over it"),
    "trainable_token_indices": ((None, [], {}), "has no single trained tokens (trainable_token_indices)"),
    "target_parameters": ((None, []), "has LoRA of a mixture's experts in layouts that are not written here"),
}
"""Fields of HF PEFT's config, the values with which vLLM opens it as it is meant, and what vLLM says to others."""
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts that leave the base as it is."""


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    for field in ("r", "lora_alpha", "target_modules"):
        if config.get(field) is None:
            yield f"vLLM needs the field {field}, which {'is empty' if field in config else 'is not there'}"
    rank = config.get("r")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        yield f"vLLM needs a rank of 1 or more, and r is {rank!r}"
    for field, (fine, why) in FIELDS.items():
        if config.get(field) not in fine:
            yield f"vLLM {why}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in STARTS:
        yield f"vLLM has no LoRA that changes the base when it begins (init_lora_weights {start!r})"


def _of_tensors(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: str, vocabulary: int
) -> Iterator[str]:  # fmt: skip
    family, ranks, halves = FAMILIES[model], set[int](), dict[str, set[str]]()
    if not shapes:
        yield "vLLM needs tensors, and there are none"
    for key, shape in shapes.items():
        path, end = key.removeprefix(PREFIX), ENDS.search(key)
        table = "lora_embedding" in key
        if path == key or end is None or table == bool(end["weight"]):
            yield f"vLLM does not know tensors like {key!r}"
            continue
        path = path.removesuffix(end[0])
        if not _has(family, path, table):
            yield f"vLLM's {model} is not known here to take LoRA at {path}"
        elif len(shape) != 2:
            yield f"vLLM takes matrices, and {key!r} has the shape {list(shape)}"
        else:
            halves.setdefault(path, set()).add(end["one"])
            ranks.add(shape[0] if end["one"] == "A" else shape[1])
            if table and end["one"] == "A" and shape[1] != vocabulary:
                yield f"vLLM's table has {vocabulary} tokens, and {key!r} has {shape[1]}"
    yield from (f"vLLM needs A and B, and {path} has {one.pop()} alone" for path, one in halves.items() if len(one) < 2)
    if ranks and ranks != {config.get("r")}:
        yield f"vLLM takes every rank from r, which is {config.get('r')!r}, and tensors have {sorted(ranks)}"
    if ranks and rank_for(max(ranks)) is None:
        yield f"vLLM takes ranks up to {RANKS[-1]}, and this one has {max(ranks)}"


def _has(family: Family, path: str, table: bool) -> bool:
    if path in TABLES:
        return path in family.tables and table == (path == TABLES[0])
    block = re.fullmatch(r"model\.layers\.\d+\.(.+)", path)
    return block is not None and block[1] in family.block and not table
