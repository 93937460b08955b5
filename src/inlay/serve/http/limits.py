"""What the server takes from one client, and from all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from inlay.values import Checked, Count, From, Help, NonNegative, Positive

__all__ = ["GUARD", "Limits", "Rate"]

GUARD = "Limits and keys"
"""The heading of these flags in `--help`."""
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Rate:
    """`count` requests in each `seconds`; "5/s", "100/m" or "2000/h" in words."""

    count: int
    seconds: float

    @classmethod
    def read(cls, value: Any) -> Rate | None:
        """Raises: ValueError whose words say what is right."""
        if value is None or isinstance(value, Rate):
            return value
        found = re.fullmatch(r"([1-9]\d{0,8})/([smh])", str(value).strip())
        if found is None:
            raise ValueError("Give requests in a second, a minute or an hour: 5/s, 100/m, 2000/h.")
        return cls(int(found[1]), SECONDS[found[2]])

    def __str__(self) -> str:
        unit = next(name for name, seconds in SECONDS.items() if seconds == self.seconds)
        return f"{self.count}/{unit}"


def _bytes(value: Any) -> Any:
    """Bytes of 1000000, 2MB, 512KB. Raises: ValueError."""
    found = re.fullmatch(r"(\d+)\s*(KB|MB)?", str(value).strip(), re.IGNORECASE)
    if found is None:
        raise ValueError("Give bytes, as 2MB or 512KB.")
    return int(found[1]) * {"KB": 1000, "MB": 1_000_000}.get((found[2] or "").upper(), 1)


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """What one request may hold, and how many there may be at once."""

    max_body: Annotated[Count, From(_bytes), Help("bytes of a request's body at most, as 2MB", GUARD)] = 2_000_000
    max_prompt: Annotated[Count, Help("tokens of a prompt at most", GUARD)] = 32_768
    max_answer: Annotated[Count, Help("tokens of an answer at most; as many where a request asks for none", GUARD)] = (
        4096
    )
    max_answers: Annotated[Count, Help("prompts times n of one request, and texts to classify, at most", GUARD)] = 256
    max_open: Annotated[Count, Help("requests in work or waiting at once", GUARD)] = 256
    max_open_per_key: Annotated[Count, Help("the same of one key", GUARD)] = 128
    slow: Annotated[Positive, Help("seconds after which a client that sends or reads nothing is left", GUARD)] = 20.0
    drain: Annotated[NonNegative, Help("seconds that answers have to end in when the server stops", GUARD)] = 30.0
