"""Whether the libraries that a run needs are installed, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from inlay.errors import InlayError, UsageError
from inlay.training.optimizers import make_optimizer

from .settings import Settings

__all__ = ["check_libraries"]


def check_libraries(settings: Settings, optimizers: Iterable[str]) -> None:
    """Raises: UsageError for an unknown tracker; InlayError naming a library that is not installed."""
    for name in dict.fromkeys(optimizers):
        make_optimizer(name, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], 1.0, 0.0)
    if settings.track is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = sorted(_name(kind) for kind in LOGGER_TYPE_TO_CLASS)
    if settings.track not in names:
        raise UsageError(f"no tracker is called {settings.track!r}", f"Trackers: {', '.join(names)}.")
    if settings.track not in map(_name, get_available_trackers()):
        raise InlayError(f"--track {settings.track} needs its library", f"pip install {settings.track}")


def _name(kind: object) -> str:
    return str(getattr(kind, "value", kind))
