"""Learns what only a running model shows: which modules use the attention interface, and the heads of their keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .find import Structure
from .site import Site

__all__ = ["attention_configs", "attention_sites", "run_tiny", "uses_interface"]

PROBE = "inlay_probe"


@dataclass
class _Seen:
    heads: int
    head_dim: int
    value_dim: int


_SEEN: dict[nn.Module, _Seen] = {}


def _watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **rest: Any) -> Any:
    """Notes the shapes and returns zeros of the right shape: nothing else of this forward is of interest."""
    _SEEN[module] = _Seen(key.shape[1], key.shape[3], value.shape[3])
    rows, heads, length, _ = query.shape
    return query.new_zeros(rows, length, heads, value.shape[3]), None


AttentionInterface.register(PROBE, _watch)
AttentionMaskInterface.register(PROBE, sdpa_mask)


def attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration object of the model that names an attention implementation, once each."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def uses_interface(base: Structure) -> bool:
    """Whether attention goes through transformers' attention interface, so that it can be taken over for one call."""
    return bool(_observed(base))


def attention_sites(base: Structure) -> list[Site]:
    """Self-attention sites in the order of the blocks, with heads, head_dim and value_dim of their keys and values.

    One tiny forward is run to learn them; a model that cannot be run that way is described by its configuration.
    """
    seen = _observed(base)
    sites = []
    paths = [site.path for site in base.attentions.values()]
    for module, site in base.attentions.items():
        if site.part == "cross-attention" or (not seen and any(p.startswith(site.path + ".") for p in paths)):
            continue  # where nothing was seen, the innermost module is the one with keys
        shape = seen.get(module) or (None if seen else _configured(base, module))
        if shape is not None and shape.heads:
            sites.append(replace(site, heads=shape.heads, head_dim=shape.head_dim, value_dim=shape.value_dim))
    return sites


_OBSERVED: WeakKeyDictionary[nn.Module, dict[nn.Module, _Seen]] = WeakKeyDictionary()


def _observed(base: Structure) -> dict[nn.Module, _Seen]:
    """Shapes by attention module, from one forward per base."""
    if base.model not in _OBSERVED:
        _OBSERVED[base.model] = _run(base.model)
    return _OBSERVED[base.model]


def _run(model: nn.Module) -> dict[nn.Module, _Seen]:
    _SEEN.clear()
    with _probing(model):
        ran = run_tiny(model)
    seen = dict(_SEEN) if ran else {}
    _SEEN.clear()
    return seen


def run_tiny(model: nn.Module) -> bool:
    """Run the smallest forward there is, for its hooks; False where the model takes inputs that are not known here."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            model(**_tiny_inputs(model))
        return True
    except Exception:  # whatever the model lacks, the configuration has to do instead
        return False
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    configs = attention_configs(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = PROBE
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _tiny_inputs(model: Any) -> dict[str, Any]:
    """The smallest batch the model takes, by the name of its main input."""
    device, config = model.device, model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, config.num_channels, high, wide, device=device, dtype=model.dtype)}
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


def _configured(base: Structure, module: nn.Module) -> _Seen | None:
    config = getattr(module, "config", None) or getattr(base.model, "config", None)
    if config is None:
        return None
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if not heads:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        shared = 1
    return _Seen(shared, int(width), int(width))
