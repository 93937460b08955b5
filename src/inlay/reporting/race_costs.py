"""What each contender of a race costs, as the page shows it: tokens, time, memory and file."""

from __future__ import annotations

from dataclasses import dataclass

from .race_entrants import Entrant, Race
from .words import interval_text, number

__all__ = ["Cost", "costs"]

MB = 2**20


@dataclass(frozen=True)
class Cost:
    """A contender's costs in texts, with the `middle` half of the latency's pairs, and the `parts` of the memory."""

    place: int
    name: str
    won: bool
    added: str
    latency: str
    middle: str
    seconds: str
    share: str
    token: str
    memory: str
    parts: str
    size: str


def costs(race: Race) -> list[Cost]:
    """Of each contender; none where nothing is known of any."""
    found = [_cost(race, own) for own in race.entrants]
    return found if any(_known(own) for own in race.entrants) else []


def _known(own: Entrant) -> bool:
    measured = own.added[0], own.added[1], own.token_ms, own.training_seconds, own.training_mb, own.file_bytes
    return any(value is not None for value in measured)


def _cost(race: Race, own: Entrant) -> Cost:
    return Cost(
        own.place, own.name, race.winner is own, _added(own), *_latency(own), *_time(race, own),
        _milliseconds(own.training_token_ms), *_memory(own), _size(own.file_bytes),
    )  # fmt: skip


def _added(own: Entrant) -> str:
    """Tokens that it adds to each row, and keys to each layer."""
    virtual, prefix = own.added
    if virtual is None and prefix is None:
        return "–"
    parts = [number(virtual)] if virtual else []
    return " + ".join([*parts, f"{number(prefix)} keys"] if prefix else parts) or "0"


def _latency(own: Entrant) -> tuple[str, str]:
    """What a token takes more, and the middle half of the pairs."""
    if own.token_ms is None:
        return "–", ""
    within = interval_text(own.token_quartiles)
    return f"{own.token_ms:+.3g}".replace("-", "−"), within


def _time(race: Race, own: Entrant) -> tuple[str, str]:
    """Its share of the race's time, and that as a share."""
    if own.training_seconds is None:
        return "–", ""
    share = f"{100 * own.training_seconds / race.stream_seconds:.1f} %" if race.stream_seconds else ""
    return f"{_short(own.training_seconds)} s", share


def _memory(own: Entrant) -> tuple[str, str]:
    """The estimate in all, and the parts it is made of, activations apart from what grows by the parameters."""
    if own.training_mb is None:
        return "–", ""
    activations = own.training_parts.get("activations")
    if activations is None:
        return f"{_short(own.training_mb)} MB", ""
    states = max(0.0, own.training_mb - activations)
    return f"{_short(own.training_mb)} MB", f"{_short(states)} states, {_short(activations)} activations"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _size(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / MB:,.1f} MB" if count >= MB / 10 else f"{count / 1024:,.1f} kB"


def _short(value: float) -> str:
    """Whole from a hundred on, with three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
