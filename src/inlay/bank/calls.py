"""What a backbone is called with and gives: how many rows, and what is left of it for who called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.batch.forward import FORWARD
from inlay.batch.layout import Layout
from inlay.errors import UsageError

__all__ = ["contiguous", "narrowed", "output_layer", "repeated", "rows_of", "without_cache"]


def output_layer(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Linear) else None


def contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The last states of many rows are a slice: torch multiplies those with a frozen weight many times slower."""
    if FORWARD.get() is None or not args or not isinstance(args[0], Tensor) or args[0].is_contiguous():
        return None
    return (args[0].contiguous(), *args[1:])


def rows_of(given: Mapping[str, Any]) -> int:
    for value in (given.get("input_ids"), given.get("inputs_embeds"), *given.values()):
        if isinstance(value, Tensor):
            return value.shape[0]
    raise UsageError("the base was called without a tensor", "Give input_ids.")


def repeated(values: Sequence[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]


def without_cache(out: Any, name: str) -> None:
    """Leave out what a prefix was carried in: who wants no cache would go on from it."""
    if name and getattr(out, name, None) is not None:
        setattr(out, name, None)


def narrowed(out: Any, layout: Layout) -> Any:
    if isinstance(out, Tensor):
        return layout.narrow(out)
    if isinstance(out, tuple):
        return (layout.narrow(out[0]), *out[1:])
    if getattr(out, "last_hidden_state", None) is not None:
        out.last_hidden_state = layout.narrow(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(layout.narrow(states) for states in out.hidden_states)
    return out
