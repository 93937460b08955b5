"""Where the rows of a batch lie in what modules are given, as tiny forwards show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .recorder import Call, first_tensor
from .tiny import quietly, tiny_inputs

__all__ = ["other_input", "second_rows", "whole_rows"]

TEXT = ("input_ids", "decoder_input_ids", "inputs_embeds")


def second_rows(calls: Mapping[str, Call]) -> frozenset[str]:
    """Paths of the modules that are given (tokens, rows, width), by a forward of one row of several tokens."""
    return frozenset(
        path for path, call in calls.items()
        if call.shapes and all(len(s) == 3 and s[0] > 1 and s[1] == 1 for s in call.shapes)
    )  # fmt: skip


def other_input(model: Any, paths: Iterable[str]) -> frozenset[str]:
    """Those of `paths` that stand in a model of images or sounds of its own, beside one that reads ids."""
    if getattr(model, "main_input_name", None) not in TEXT:
        return frozenset()
    own = {path: getattr(module, "main_input_name", None) for path, module in model.named_modules()}
    found = set()
    for path in paths:
        around = path
        while around and own.get(around) is None:
            around = around.rpartition(".")[0]
        if around and own[around] not in TEXT:
            found.add(path)
    return frozenset(found)


def whole_rows(model: Any, calls: Mapping[str, Call], paths: Iterable[str]) -> frozenset[str]:
    """Those of `paths` that are given several units of each row, such as windows, one row's behind the other's.

    Seen in a batch of two rows, whose units must be those of the rows alone. Nothing is run where none is given more
    units than rows.
    """
    cut = {path for path in paths if path in calls and any(len(s) > 2 and s[0] > 1 for s in calls[path].shapes)}
    modules = {model.get_submodule(path): path for path in cut - second_rows(calls)}
    if not modules:
        return frozenset()
    with quietly(model):
        for make in tiny_inputs(model):
            try:
                one = make()
                other = {name: _changed(value) for name, value in one.items()}
                both = {name: torch.cat([value, other[name]]) for name, value in one.items()}
                alone, beside, together = (_inputs(model, modules, batch) for batch in (one, other, both))
            except Exception:  # whatever the model lacks, the next batch may have
                continue
            return frozenset(path for path in together if _apart(alone[path], beside[path], together[path]))
    return frozenset()


def _changed(value: Tensor) -> Tensor:
    return 0.3 - value if value.is_floating_point() else value.flip(-1)


def _inputs(model: nn.Module, modules: Mapping[nn.Module, str], batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What each module is given, call by call."""
    found: dict[str, list[Tensor]] = {path: [] for path in modules.values()}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None:
            found[modules[module]].append(x)

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _apart(one: list[Tensor], other: list[Tensor], both: list[Tensor]) -> bool:
    if not len(one) == len(other) == len(both):
        return False
    pairs = [(torch.cat([a, b]), c) for a, b, c in zip(one, other, both, strict=True) if a.shape == b.shape]
    return len(pairs) == len(both) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in pairs
    )
