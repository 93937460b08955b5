"""What depends on the route must not be compiled: torch.compile would keep what the first call saw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Uncompiled", "forget_compiled", "never_compiled"]

DYNAMO = "torch._dynamo"
"""torch's compiler; it takes a second to import, so it is asked only where somebody has imported it."""

_frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
_compiler: Callable[[], object] = getattr(_frames, "get_eval_frame_callback", lambda: True)  # None: off in this thread


def never_compiled(function: Any) -> Any:
    """`function`, which torch's compiler will neither follow calls into nor compile."""
    function._torchdynamo_disable = True
    if hasattr(_frames, "_FrameExecStrategy"):
        skip = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
        _frames.set_code_exec_strategy(function.__code__, skip)
    return function


class Uncompiled:
    """Calls `run` with torch's compiler switched off for all that it does."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    @never_compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if DYNAMO not in sys.modules or _compiler() is None:
            return self._run(*args, **kwargs)
        return sys.modules[DYNAMO].disable(self._run)(*args, **kwargs)


def forget_compiled() -> None:
    """Let torch's compiler look again at modules that have changed: it guards neither their hooks nor their forward."""
    dynamo: Any = sys.modules.get(DYNAMO)
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        dynamo.reset()
