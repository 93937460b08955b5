"""The one attention function: the base's own, unless the call in flight has prefixes or packed segments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .call import current

__all__ = ["taken_over"]

NAMES = {"eager": "inlay_eager", "sdpa": "inlay_sdpa"}
"""The base's implementation, and the name ours goes by in its place; every other one is replaced like sdpa."""


def _attention(
    implementation: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **rest: Any
) -> tuple[Tensor, Any]:
    """What a base's attention module calls with q (B, heads, q, dim) and k, v (B, shared heads, k, dim)."""
    if args:  # a few models give scaling by position
        rest = {**dict(zip(("scaling", "dropout"), args, strict=False)), **rest}
    plain, call = _plain(implementation, module), current()
    if call is None or not call.attends:
        return plain(module, q, k, v, mask, **rest)
    return call.attend(plain, module, (q, k, v), mask, **rest)


def _mask(implementation: str, **call: Any) -> Any:
    plain, flight = ALL_MASK_ATTENTION_FUNCTIONS[implementation], current()
    return plain(**call) if flight is None or not flight.attends else flight.mask(plain, call)


def _plain(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function the module would call: the one of its own file comes before the common one."""
    source = sys.modules[type(module).__module__]
    if implementation == "eager":
        return source.eager_attention_forward
    return getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[implementation]


for _own, _name in NAMES.items():
    AttentionInterface.register(_name, partial(_attention, _own))
    AttentionMaskInterface.register(_name, partial(_mask, _own))


@contextmanager
def taken_over(configs: Sequence[Any]) -> Iterator[None]:
    """Let attention of the modules with these configurations go through the current call."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config, own in zip(configs, before, strict=True):
            # Configurations are shared by models and stacks: a nested call finds ours there already.
            if own not in NAMES.values():
                config._attn_implementation_internal = NAMES.get(own, NAMES["sdpa"])
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own
