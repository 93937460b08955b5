"""What HF PEFT makes of a config when it opens an adapter of a mixture, and how a config stays clear of it.

For bases whose experts were modules once, HF PEFT takes every target that ends as one of those did (`down_proj`) for
the experts, and turns it into a target parameter: LoRA of dense layers and of shared experts would be lost. The weight
of such a layer named as a parameter means the same LoRA, under the same keys, and is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from inlay.methods.contract import Structure

__all__ = ["spared_rewriting"]


def spared_rewriting(config: Mapping[str, Any], base: Structure) -> dict[str, Any]:
    """The config of a method that has `target_parameters`, so that HF PEFT opens it on `base` as it is meant. HF PEFT
    knows no dropout beside parameters: where there are some, the file says 0, which only training would feel."""
    made = dict(config)
    if "target_parameters" not in config:
        return made
    names = _names_of_experts(base) if base.expert_modules else set()
    moved = [path for path in config["target_modules"] if path.rpartition(".")[2] in names]
    made["target_modules"] = [path for path in config["target_modules"] if path not in moved]
    made["target_parameters"] = [*config["target_parameters"], *(f"{path}.weight" for path in moved)]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        own = {
            path: next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", path)), None) for path in moved
        }
        made[field] = {**patterns, **{re.escape(f"{path}.weight"): v for path, v in own.items() if v is not None}}
    if not made["target_parameters"]:
        return {name: value for name, value in made.items() if name != "target_parameters"}
    return {**made, "lora_dropout": 0.0}


def _names_of_experts(base: Structure) -> set[str]:
    """The last names of layers that single experts had, as transformers converts them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = [rule for rule in get_model_conversion_mapping(base.model) if isinstance(rule, WeightConverter)]  # pyright: ignore
    except (ImportError, AttributeError, TypeError):
        return set()
    sources = (source.removesuffix(".weight") for rule in rules for source in rule.source_patterns)
    return {name.rpartition(".")[2] for name in sources}
