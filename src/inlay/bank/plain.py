"""The model that a bank can be attached to, of what people have at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from inlay.bases.heads import can_write
from inlay.errors import UsageError

from .adapter import Part
from .unchanged import check_in_memory

__all__ = ["NotCopied", "mark_attached", "not_compiled", "plain_model", "unmark_attached"]

_attached: WeakSet[nn.Module] = WeakSet()  # not an attribute of the model: its copies and pickles have no bank


class NotCopied:
    """What can be neither copied nor pickled."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise UsageError(
            "a bank can be neither copied nor pickled",
            "Copy bank.model, which comes without its adapters, attach to the copy, and load what bank.save wrote.",
        )


def plain_model(model: nn.Module) -> nn.Module:
    """`model`, or what it was compiled from.

    Raises: UsageError where it is a wrapper, has a bank already, has compiled blocks, or is not in memory.
    """
    model = getattr(model, "_orig_mod", model)
    if type(model).__module__.split(".")[0] == "peft" or any(
        type(m).__module__.startswith("peft.tuners") for m in model.modules()
    ):
        raise UsageError(
            f"{type(model).__name__} holds adapters of HF PEFT",
            "Save them, and attach to the base: model.unload(), or load it anew; bank.load reads what PEFT saved.",
        )
    check_in_memory(model)
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
    compiled = vars(model).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            model._compiled_call_impl = compiled


def mark_attached(model: nn.Module) -> None:
    """Say that `model` has a bank."""
    _attached.add(model)


def unmark_attached(model: nn.Module) -> None:
    """The inverse of `mark_attached`."""
    _attached.discard(model)


def peft_task(model: nn.Module, parts: Sequence[Part]) -> str | None:
    """What HF PEFT calls the kind of model: its classes for a kind hand on what models of text take; None is the class
    that hands on whatever it is given. It wants a head in the files of adapters for classification: those that have
    none are called by a kind that wants none."""
    config, name = model.config, type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    heads = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    task = next((task for end, task in heads.items() if name.endswith(end)), None)
    if task is not None and any(part.method.replaces for part in parts):
        return task
    if not can_write(model) or task is not None:
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
