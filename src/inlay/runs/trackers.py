"""Metrics for experiment trackers, through accelerate's own: TensorBoard, wandb, MLflow and others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.errors import InlayError, UsageError

__all__ = ["Tracker"]


class Tracker:
    """Hands each step's numbers to the tracker called `name`; to none where it is None."""

    def __init__(self, name: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        self._tracker: Any = None
        if name is None:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kinds = {str(getattr(kind, "value", kind)): made for kind, made in LOGGER_TYPE_TO_CLASS.items()}
        if name not in kinds:
            raise UsageError(f"no tracker is called {name!r}", f"Trackers: {', '.join(kinds)}.")
        kind = kinds[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        try:
            self._tracker = kind("inlay", **place)
            if hasattr(self._tracker, "start"):
                self._tracker.start()
        except ImportError as error:
            raise InlayError(f"--track {name} needs {error.name}", f"pip install {name}") from None
        self._tracker.store_init_configuration({k: _plain(v) for k, v in config.items()})

    def add(self, step: int, line: Mapping[str, Any], prefix: str = "") -> None:
        """Log the numbers of a metrics line at the run's `step`, their names behind `prefix`."""
        if self._tracker is None:
            return
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        numbers |= {f"heldout/{k}": v for k, v in line.get("heldout", {}).items()}
        self._tracker.log({f"{prefix}{k}": v for k, v in numbers.items()}, step=step)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
