"""The optimizers there are, by name: torch's own, and those of well-kept libraries, imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inlay.bases.extras import extra_packages
from inlay.errors import InlayError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["ELEMENTWISE", "OPTIMIZERS", "make_optimizer"]

Groups = Sequence[dict[str, Any]]
Make = Callable[[Groups, float, float], "torch.optim.Optimizer"]


def _adamw(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def _sgd(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from torch.optim import SGD

    return SGD(groups, lr=lr, weight_decay=weight_decay, momentum=0.9)


def _adafactor(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from torch.optim import Adafactor

    return Adafactor(groups, lr=lr, weight_decay=weight_decay)


def _lion(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Chen et al. 2023, arXiv:2302.06675."""
    from lion_pytorch import Lion

    return Lion(groups, lr=lr, weight_decay=weight_decay)  # pyright: ignore[reportArgumentType]


def _schedule_free(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Defazio et al. 2024, arXiv:2405.15682."""
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(groups, lr=lr, weight_decay=weight_decay)
    made.train()
    return made


def _adamw_8bit(groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Dettmers et al. 2021, arXiv:2110.02861; small tensors keep 32 bits."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=lr, weight_decay=weight_decay)  # pyright: ignore[reportArgumentType]


OPTIMIZERS: dict[str, Make] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "schedule-free": _schedule_free,
    "adamw-8bit": _adamw_8bit,
}


ELEMENTWISE = frozenset({"adamw", "sgd", "lion", "schedule-free"})
"""Those to which the shapes of tensors mean nothing, so that an adapter's may be one."""


def make_optimizer(name: str, groups: Groups, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer called `name`. Raises: UsageError naming those there are; InlayError where its library lacks."""
    if name not in OPTIMIZERS:
        raise UsageError(f"no optimizer is called {name!r}", f"Optimizers: {', '.join(OPTIMIZERS)}.")
    try:
        return OPTIMIZERS[name](groups, lr, weight_decay)
    except ImportError as error:
        install = " ".join(f"'{package}'" for package in extra_packages("optimizers"))
        raise InlayError(f"optimizer {name} needs {error.name}", f"pip install {install}.") from None
