"""What stands in for a module's forward while a bank is attached. Copies and pickles get the module's own back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from torch import nn

from inlay.sites.uncompiled import Uncompiled, forget_compiled, never_compiled

__all__ = ["StandIn"]

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class StandIn:
    """Calls `run(original, args, kwargs)` in the place of `original`, the forward that `module` has had, or another of
    its methods by `name`."""

    def __init__(self, module: nn.Module, run: Run, name: str = "forward") -> None:
        self.module, self.name, self.original, self._run = module, name, getattr(module, name), Uncompiled(run)
        update_wrapper(self, self.original)  # who asks for its signature gets the module's own
        self._before = vars(module).get(name)
        setattr(module, name, self)
        forget_compiled()

    def remove(self) -> None:
        """Give the module its own back, unless somebody else has put another over ours."""
        if vars(self.module).get(self.name) is not self:
            return
        if self._before is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self._before)
        forget_compiled()

    @never_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.module, self.name)) if self._before is None else (_same, (self._before,))


def _same(forward: Any) -> Any:
    return forward
