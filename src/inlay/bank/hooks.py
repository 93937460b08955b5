"""Hooks as objects that copies and pickles of a model do not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from inlay.kernels.standin import StandIn
from inlay.sites.uncompiled import Uncompiled, forget_compiled, never_compiled

__all__ = ["Hook", "hooked", "strip"]


class Hook:
    """A hook on a module; a copy of the module has one that does nothing in its place."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = Uncompiled(run)
        self._handle: RemovableHandle | None = None

    @classmethod
    def before(cls, module: nn.Module, run: Callable[..., Any], first: bool = False, named: bool = False) -> Hook:
        """Call `run(module, args)` before its forward; `first` of all hooks; with `named` arguments as well."""
        hook = cls(run)
        hook._handle = module.register_forward_pre_hook(hook, prepend=first, with_kwargs=named)
        forget_compiled()
        return hook

    @classmethod
    def after(cls, module: nn.Module, run: Callable[..., Any], named: bool = False) -> Hook:
        """Call `run(module, args, output)` behind its forward; with `named` arguments as well."""
        hook = cls(run)
        hook._handle = module.register_forward_hook(hook, with_kwargs=named)
        forget_compiled()
        return hook

    def stay_last(self) -> None:
        """Run behind the other hooks of its module, those too that others have placed since."""
        handle, hooks = self._handle, None if self._handle is None else self._handle.hooks_dict_ref()
        if handle is not None and hooks is not None and next(reversed(hooks), None) != handle.id:
            hooks.move_to_end(handle.id)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            forget_compiled()

    @never_compiled
    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _none, ()


def hooked(model: nn.Module) -> bool:
    """Whether others have hooked something onto a model's modules."""
    every = (own for module in model.modules() for own in (module._forward_hooks, module._forward_pre_hooks))
    return any(not isinstance(hook, Hook) for hooks in every for hook in hooks.values())


def strip(model: nn.Module) -> None:
    """Take every hook and stand-in off `model`, those too that an interruption left without an owner."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in [hook for hook in hooks.values() if isinstance(hook, Hook)]:
                hook.remove()
        while standins := [value for value in vars(module).values() if isinstance(value, StandIn)]:
            for standin in standins:  # one may stand over another
                standin.remove()


def _nothing(*args: Any) -> None:
    """What is left of a hook in a copy."""


def _none() -> Callable[..., None]:
    return _nothing
