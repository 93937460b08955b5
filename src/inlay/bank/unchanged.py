"""Whether a base is still what the bank was attached to: its modules, its tables of tokens, its weights in memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.errors import UsageError

__all__ = ["Unchanged", "check_in_memory"]

ANEW = "Detach the bank, change the base, and attach to what it is then."


class Unchanged:
    """Remembers the modules of `model`, and how many rows each table of embeddings and the head has.

    Hooks stay on a module that was replaced, and adapters would act nowhere; a parameter of a table that was resized
    has another size than the table.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = [
            (parent._modules, name, child, f"{path}.{name}".lstrip("."))
            for path, parent in model.named_modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        tables = [(path, child) for _, _, child, path in self._places if isinstance(child, nn.Embedding)]
        self._rows: list[tuple[str, Any, Any]] = [(path, t, t.weight.shape) for path, t in tables]
        head = _head(model)
        if head is not None:
            self._rows.append((head[0], head[1], head[1].weight.shape))

    def check(self) -> None:
        """Raises: UsageError naming a module that was replaced, a table that was resized, or weights that were taken
        out of memory, since the bank was attached."""
        if any(table.weight.shape != shape for _, table, shape in self._rows):
            path, table, shape = next(entry for entry in self._rows if entry[1].weight.shape != entry[2])
            now = f"{tuple(table.weight.shape)} now (resize_token_embeddings)"
            raise UsageError(f"{path} had the shape {tuple(shape)} when the bank was attached, and has {now}", ANEW)
        if not all(modules.get(name) is child for modules, name, child, _ in self._places):
            path = next(path for modules, name, child, path in self._places if modules.get(name) is not child)
            raise UsageError(f"{path} was replaced after the bank was attached", ANEW)
        if "_hf_hook" in vars(self._model):  # accelerate has placed the weights
            check_in_memory(self._model)


def _head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The model's output layer and its path, where it has one with a weight."""
    try:
        head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    except (NotImplementedError, AttributeError):
        return None
    if head is None or getattr(head, "weight", None) is None:
        return None
    return next((path for path, module in model.named_modules() if module is head), "the head"), head


def check_in_memory(model: nn.Module) -> None:
    """Raises: UsageError where weights of `model` are not in the memory of one device."""
    away = next((path for path, p in model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise UsageError(
            f"the weight {away} is not in memory (accelerate offloads it, or it was never loaded)",
            "Load the base whole: not offloaded and on one device, in bfloat16 or quantized where it is too large.",
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise UsageError(
            f"the base lies on {' and '.join(devices)}, and adapters on one device",
            'Load it onto one: device_map={"": 0}, in bfloat16 or quantized where it is too large.',
        )
