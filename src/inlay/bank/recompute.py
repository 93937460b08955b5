"""Gradient checkpointing: a block is computed again in the backward, in the forward that it was computed in first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from inlay.batch.forward import FORWARD, inside
from inlay.errors import UsageError

__all__ = ["bind_checkpoints", "checkpointed_blocks", "recomputing", "unbind_checkpoints"]

NAME = "_gradient_checkpointing_func"


class _Bound:
    """A checkpointing function that runs its block inside the forward it was called in, whichever thread computes it
    again. Copies and pickles get the function itself."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        forward = FORWARD.get()
        graphs: list[bool] = []  # whether each computation of the block builds one

        def run(*inner: Any, **named: Any) -> Any:
            graphs.append(torch.is_grad_enabled())
            # Where the first builds none, as in reentrant checkpoints, each block has a backward of its own, and can
            # share no graph with the others.
            own = replace(forward, cache={}) if forward is not None and graphs[0] != graphs[-1] else forward
            with inside(own), _eval_mode_inside(function):
                return function(*inner, **named)

        # A block's own arguments by name stand in a partial around it.
        fits = _takes_gradients(args) and not _takes_gradients({**getattr(function, "keywords", {}), **kwargs}.values())
        how = self.original if fits or not torch.is_grad_enabled() else _not_reentrant(self.original)
        return how(run, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.original

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.original,)


def _takes_gradients(values: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _not_reentrant(original: Callable[..., Any]) -> Callable[..., Any]:
    """What does the same for a block whose inputs take no gradients, as a tower's first, or others than those by place
    do, as WavLM's biases of positions: reentrant checkpoints would lose those of the adapters in it, or go through the
    block that gave the other input again and again without end."""
    if isinstance(original, partial) and original.keywords.get("use_reentrant"):
        return partial(original.func, *original.args, **{**original.keywords, "use_reentrant": False})
    return original


def _same(function: Any) -> Any:
    return function


def bind_checkpoints(modules: Sequence[nn.Module]) -> None:
    """Let the checkpoints of `modules`, whoever has switched them on, know the forward that they belong to."""
    for module in modules:
        original = vars(module).get(NAME)
        if original is not None and not isinstance(original, _Bound):
            setattr(module, NAME, _Bound(original))


def unbind_checkpoints(model: nn.Module) -> None:
    """The inverse of `bind_checkpoints`."""
    for module in model.modules():
        if isinstance(bound := vars(module).get(NAME), _Bound):
            setattr(module, NAME, bound.original)


def checkpointed_blocks(model: Any) -> int:
    """How many parts of a model are computed again one by one."""
    return len(_blocks([m for m in model.modules() if hasattr(m, "gradient_checkpointing")]))


def _blocks(modules: Sequence[Any]) -> list[Any]:
    return [m for m in modules if isinstance(m, GradientCheckpointingLayer)] or list(modules)


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Each block saves its input alone and is computed again in the backward; the base stays in evaluation mode.

    transformers recomputes in training mode only: the flags are set on the blocks themselves, and put back in the end.
    Its own switch would leave a hook on the embeddings behind. Raises: UsageError where the base has no checkpoints.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(f"{type(model).__name__} has no gradient checkpointing", "Lower --tokens-at-once instead.")
    modules = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    blocks = _blocks(modules)
    before = [(m, {k: vars(m)[k] for k in ("gradient_checkpointing", NAME) if k in vars(m)}) for m in modules]
    modes = [(block, block.training) for block in blocks]
    try:
        for module in modules:
            module.gradient_checkpointing = True
            setattr(module, NAME, _Bound(partial(checkpoint, use_reentrant=False)))
        for block in blocks:
            block.training = True
        yield
    finally:
        for module, values in before:
            for name in ("gradient_checkpointing", NAME):
                vars(module).pop(name, None)
            vars(module).update(values)
        for block, mode in modes:
            block.training = mode


@contextmanager
def _eval_mode_inside(function: Any) -> Iterator[None]:
    """Evaluation mode for the block that `function` computes, where all inside of it are in it already."""
    block = next((o for o in _owners(function) if isinstance(o, nn.Module)), None)
    if block is None or not block.training or any(child.training for child in block.children()):
        yield
        return
    block.training = False
    try:
        yield
    finally:
        block.training = True


def _owners(function: Any) -> list[Any]:
    """Whose forward it may be: the object of a bound method, or the first argument of a partial."""
    inner = getattr(function, "func", function)
    return [getattr(inner, "__self__", None), *getattr(function, "args", ())[:1]]
