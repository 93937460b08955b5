"""One ask inside of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.errors import InlayError

from .entries import Claim, plain_names
from .tickets import Ask, Ticket

__all__ = ["Work", "told"]


@dataclass(eq=False)
class Work:
    """An ask: its ticket, the adapters that it waits for, and its number while it runs. `retry` is when adapters are
    looked at again whose files were not whole yet."""

    ticket: Ticket
    claim: Claim
    number: int = -1
    retry: float = 0.0

    @property
    def ask(self) -> Ask:
        return self.ticket.ask


def told(error: Exception) -> InlayError:
    """What users are told of an error."""
    if isinstance(error, InlayError):
        return plain_names(error)
    return InlayError(f"the request failed inside of the server ({type(error).__name__})", "See the server's log.")
