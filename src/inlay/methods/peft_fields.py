"""The fields of HF PEFT's adapter_config.json, method by method: which of them are read, which say nothing that a saved
adapter still depends on, and which are refused unless they have their default.

A field that is in no list is refused by name as well: what nobody here has read about may change every logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import FormatError

__all__ = [
    "ADALORA_FIELDS",
    "COMMON",
    "IA3_FIELDS",
    "LORA_FIELDS",
    "NORM_FIELDS",
    "PREFIX_FIELDS",
    "PROMPT_FIELDS",
    "SIZES",
    "VERA_FIELDS",
    "Fields",
    "check_one_variant",
]


VARIANTS = ("use_dora", "lora_bias", "alora_invocation_tokens")
"""Fields that make another method of LoRA, of which a config may set one."""


def check_one_variant(config: Mapping[str, Any]) -> None:
    """Raises: FormatError where a config sets several."""
    found = [name for name in VARIANTS if config.get(name)]
    if len(found) > 1:
        raise FormatError(f"the adapter sets {' and '.join(found)}, which do not go together here", "Use one of them.")


@dataclass(frozen=True)
class Fields:
    """The fields of one type, each with the default that HF PEFT gives it.

    `read` ones are honoured whatever they say, or the reader of theirs refuses their value; `passed` ones only say
    where an adapter comes from, how it began or how it is trained; `refused` ones must have their default.
    """

    read: Mapping[str, Any]
    passed: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)
    older: Mapping[str, Any] = field(default_factory=dict)
    """What releases of HF PEFT before 0.3 wrote; refused unless they have these values."""

    def defaults(self) -> dict[str, Any]:
        return {**COMMON.read, **COMMON.passed, **self.read, **self.passed, **self.refused}


COMMON = Fields(
    read={"peft_type": None},
    passed={
        "task_type": None,  # the modules that a task adds stand in modules_to_save
        "auto_mapping": None,
        "peft_version": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": False,
    },
)
"""Fields of every type."""

_LAYERS = {"layers_to_transform": None, "layers_pattern": None}
SIZES = {"token_dim": None, "num_attention_heads": None, "num_layers": None}
"""Sizes of the base, which the shape of the tensor shows again."""


LORA_FIELDS = Fields(
    read={
        "r": 8,
        "target_modules": None,
        "target_parameters": None,
        "exclude_modules": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        **_LAYERS,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
        "alora_invocation_tokens": None,
        "ensure_weight_tying": False,
        "trainable_token_indices": None,
    },
    passed={
        "fan_in_fan_out": False,  # how the base stores a weight
        "megatron_core": "megatron.core",
        # what a start needs: that of a start which changes the base is refused with init_lora_weights
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "qalora_group_size": 16,
    },
    refused={
        "megatron_config": None,
        "velora_config": None,
        "use_qalora": False,
        "monteclora_config": None,
        "layer_replication": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
    },
    older={"enable_lora": None, "merge_weights": False},
)

ADALORA_FIELDS = Fields(
    read={
        "target_r": 8,
        "init_r": 12,
        "lora_alpha": 8,
        "target_modules": None,
        "exclude_modules": None,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        **_LAYERS,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "rank_pattern": None,
    },
    passed={
        **{name: value for name, value in LORA_FIELDS.passed.items() if name != "loftq_config"},
        "r": 8,  # init_r is what counts
        "init_lora_weights": True,  # of those that change the base, AdaLoRA's layers know none
        "total_step": None,
        # of LoRA's layers alone
        "alpha_pattern": {},
        "use_rslora": False,
    },
    refused={
        **LORA_FIELDS.refused,
        "loftq_config": {},
        "alora_invocation_tokens": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "lora_bias": False,
        "use_dora": False,
        "ensure_weight_tying": False,
    },
)

IA3_FIELDS = Fields(
    read={"target_modules": None, "exclude_modules": None, "feedforward_modules": None, "modules_to_save": None},
    passed={"fan_in_fan_out": False, "init_ia3_weights": True},
)

VERA_FIELDS = Fields(
    read={
        "r": 256,
        "target_modules": None,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "bias": "none",
        "modules_to_save": None,
        **_LAYERS,
    },
    passed={"fan_in_fan_out": False, "init_weights": True},
)

NORM_FIELDS = Fields(read={"target_modules": None, "exclude_modules": None, "modules_to_save": None})

PREFIX_FIELDS = Fields(
    read={"num_virtual_tokens": None, "modules_to_save": None},
    passed={
        **SIZES,
        "init_weights": None,
        "num_transformer_submodules": None,
        "encoder_hidden_size": None,
        "prefix_projection": False,  # multiplied out when it is saved
    },
)

PROMPT_FIELDS = Fields(
    read={"num_virtual_tokens": None, "num_transformer_submodules": None, "modules_to_save": None},
    passed={
        **SIZES,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    },
)
