"""Whether the libraries that a run will need are there, before anything is loaded."""

from __future__ import annotations

import torch
from torch import nn

from inlay.errors import InlayError, UsageError
from inlay.training.optimizers import make_optimizer

from .settings import Settings

__all__ = ["check_libraries"]


def check_libraries(settings: Settings) -> None:
    """Raises: UsageError for a tracker that nobody knows; InlayError naming the library that lacks."""
    make_optimizer(settings.optimizer, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], 1.0, 0.0)
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
