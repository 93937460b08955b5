"""Why a server refuses, in words that its HTTP side turns into answers."""

from __future__ import annotations

from pathlib import Path

from inlay.errors import InlayError

__all__ = ["Busy", "Forbidden", "NotSettled", "UnknownAdapter"]


class UnknownAdapter(InlayError):
    """No adapter is served under a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no adapter is called {name!r}", "See which there are: /v1/models.")


class Forbidden(InlayError):
    """A path leads out of the folders that adapters are served from, or to a file that is never opened."""


class NotSettled(InlayError):
    """An adapter's files may be in the making."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"the files in {folder} have just changed", "Try again in a moment.")


class Busy(InlayError):
    """The engine takes no more now; `retry_after` seconds are a good time to wait."""

    def __init__(self, retry_after: float, what: str = "as many requests wait as may") -> None:
        self.retry_after = retry_after
        super().__init__(what, f"Try again in {max(1, round(retry_after))} s.")
