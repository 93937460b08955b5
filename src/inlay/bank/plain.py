"""The model that a bank can be attached to, of what people have at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from inlay.errors import UsageError

__all__ = ["mark_attached", "not_compiled", "plain_model", "unmark_attached"]

_attached: WeakSet[nn.Module] = WeakSet()  # not an attribute of the model: its copies and pickles have no bank


def plain_model(model: nn.Module) -> nn.Module:
    """`model`, or what it was compiled from.

    Raises: UsageError where it is a wrapper, has a bank already, or has compiled blocks.
    """
    model = getattr(model, "_orig_mod", model)
    if type(model).__module__.split(".")[0] == "peft" or any(
        type(m).__module__.startswith("peft.tuners") for m in model.modules()
    ):
        raise UsageError(
            f"{type(model).__name__} holds adapters of HF PEFT",
            "Save them, and attach to the base: model.unload(), or load it anew; bank.load reads what PEFT saved.",
        )
    if model in _attached:
        raise UsageError("the model has a bank already", "Use that bank, or detach it first.")
    for path, module in model.named_modules():
        # What is compiled would not show how the base runs, and a wrapper changes the names of all that it holds.
        if hasattr(module, "_orig_mod") or (path and module._compiled_call_impl is not None):
            raise UsageError(
                f"{path.removesuffix('._orig_mod')} is compiled by itself",
                "Attach first and call block.compile() afterwards, or compile the whole model.",
            )
    return model


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Let a model that was compiled in place run as it is written."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def mark_attached(model: nn.Module) -> None:
    """Say that `model` has a bank."""
    _attached.add(model)


def unmark_attached(model: nn.Module) -> None:
    """The inverse of `mark_attached`."""
    _attached.discard(model)


def peft_task(model: nn.Module) -> str | None:
    """What HF PEFT calls the kind of model."""
    name = type(model).__name__
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    kinds |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in kinds.items() if name.endswith(end)), "FEATURE_EXTRACTION")
