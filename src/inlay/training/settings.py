"""What a run depends on, by the names of the command's flags, and what may change between its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import UsageError
from inlay.methods.contract import Method
from inlay.methods.table import METHODS

from .plan import Plan

__all__ = ["Settings", "differences", "make_method", "plan_of"]


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, by the names of the command's flags."""

    base: str
    data: Sequence[str]
    out: str
    method: str = "lora"
    set: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    lr: float = 1e-3
    schedule: str | None = None
    warmup: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    neftune_alpha: float = 0.0
    label_smoothing: float = 0.0
    max_length: int = 512
    dtype: str = "auto"
    device: str | None = None
    quantize: str | None = None
    seed: int = 0
    limit: int | None = None
    heldout: str = "0.05"
    eval_every: int | None = None
    metric: str | None = None
    patience: int | None = None
    template: str | None = None
    verbalizer: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    virtual_tokens_at: str = "start"
    tokens_at_once: int = 4096
    gradient_checkpointing: bool = False
    memory_limit: str | None = "auto"
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    resume: bool = False
    track: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_at_once", "eval_every", "patience", "checkpoint_every", "keep_checkpoints", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", "Give 1 or more.")
        if self.virtual_tokens_at not in ("start", "after-system", "before-answer"):
            raise UsageError(
                f"virtual tokens cannot stand at {self.virtual_tokens_at!r}",
                "Choose start, after-system or before-answer.",
            )


FREE = ("out", "resume", "checkpoint_every", "keep_checkpoints", "memory_limit", "track", "base", "data", "device")
"""Settings that may differ when a run is resumed: they change nothing, or what they name is compared by content."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two runs' settings differs, for people; settings that change no result are left out."""
    names = [name for name in {**before, **now} if name not in FREE]
    return [f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


def make_method(name: str, values: Mapping[str, Any]) -> Method:
    """The method called `name` with some settings. Raises: UsageError naming methods or fields there are."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", f"Methods: {', '.join(METHODS)}.")
    fields = {f.name for f in dataclasses.fields(METHODS[name]) if f.init}
    for key in values:
        if key not in fields:
            raise UsageError(f"{name} has no setting {key!r}", f"Settings: {', '.join(sorted(fields))}.")
    try:
        return METHODS[name](**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be set to {dict(values)} ({error})", "Check the values.") from None


def plan_of(settings: Settings, method: Method, name: str = "adapter") -> Plan:
    """The plan that `settings` make for one adapter. Raises: UsageError."""
    names = {f.name for f in dataclasses.fields(Plan)} & {f.name for f in dataclasses.fields(Settings)} - {"method"}
    if settings.virtual_tokens_at != "start" and not method.virtual_length:
        why = "keys of a prefix stand before every token" if method.prefix_length else "it has no virtual tokens"
        raise UsageError(f"{type(method).title} cannot act at {settings.virtual_tokens_at} ({why})", "Use start.")
    return Plan(name=name, method=method, **{name: getattr(settings, name) for name in names})
