"""Errors that people read: each names the thing that is wrong and the remedy, on one line."""

from __future__ import annotations

__all__ = ["DataError", "DroppedRow", "FormatError", "InlayError", "UsageError"]


class InlayError(Exception):
    """Base of every error Inlay raises on purpose; the commands print it on one line and exit with `exit_code`.

    `what` names the thing that is wrong; `remedy`, where given, says what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what.rstrip('.')}. {remedy}".strip() if remedy else what)


class UsageError(InlayError):
    """The call itself is wrong (unknown name, option, setting, path): another command line mends it."""

    exit_code = 2


class DataError(InlayError):
    """A data file or one of its rows cannot be used; names the file and, where it can, the line."""


class DroppedRow(DataError):
    """A row that cannot be used but is no reason to stop: a pass over many rows counts it by `reason`.

    `reason` is two to five plain words, equal for equal causes ("no label", "answer too long"). As an error it names
    the row's file and line.
    """

    def __init__(self, where: str, reason: str, remedy: str = "") -> None:
        self.reason = reason
        super().__init__(f"{where} is of no use: {reason}", remedy)


class FormatError(InlayError):
    """A checkpoint cannot be read or does not fit the base; names the keys or shapes that differ."""
