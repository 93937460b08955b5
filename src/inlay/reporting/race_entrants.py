"""The contenders of a race as the page shows them, from race.json, run.json, events.jsonl, metrics.jsonl and the
final rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.evaluation.compare import HIGHER, Comparison
from inlay.files import json_lines
from inlay.methods.table import METHODS
from inlay.values import fields_of

from .curves import read_metrics
from .race_rows import FinalRows, paired, read_final_rows
from .words import is_number

__all__ = ["Entrant", "Race", "rate_text", "read_race", "value_text"]

APART = ("lr", "seed", "steps", "epochs", "stop_after", "name", "method", "set")
"""Fields of a plan that are shown apart, or are the race's own."""
SHOWN = ("r", "num_virtual_tokens", "targets", "reduction_factor")
"""Settings that say how much is trained and where: they are shown where they are the defaults too."""
LIVE = ("running", "interrupted")


@dataclass(frozen=True)
class Entrant:
    """A contender; what is not known is None.

    `settings` are the method's and the course's; `line` says them in few words, the learning rate with them. `score`
    and its `interval` are of the final rows, `choosing` and `first` of the choosing rows: the best, and the one at the
    first rung. `token_ms` is what a decoded token takes more than with the base alone, milliseconds, with the middle
    half of its pairs. `training_seconds` is its share of the race's time, `training_token_ms` what a token of a step of
    its own took, and `training_mb` an estimate of its memory (MiB), of which `training_parts` are the parts. `base` and
    `winner` are the comparisons with those two on the final rows.
    """

    place: int
    name: str
    method: str
    title: str
    line: str
    state: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    seed: Any = None
    score: float | None = None
    interval: Any = None
    choosing: float | None = None
    first: float | None = None
    rungs: int | None = None
    steps: int | None = None
    total: int | None = None
    tokens: int | None = None
    parameters: int | None = None
    file_bytes: int | None = None
    added: tuple[int | None, int | None] = (None, None)
    token_ms: float | None = None
    token_quartiles: Any = None
    training_seconds: float | None = None
    training_token_ms: float | None = None
    training_mb: float | None = None
    training_parts: Mapping[str, float] = field(default_factory=dict)
    base: Comparison | None = None
    winner: Comparison | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    rows: FinalRows | None = None

    @property
    def diverged(self) -> bool:
        return self.state.startswith("diverged")


@dataclass(frozen=True)
class Race:
    """A race, ended or not. `rungs` are shares of a course; `unmeasured` says why no token's time is known."""

    status: str
    metric: str
    entrants: Sequence[Entrant]
    winner: Entrant | None = None
    base: float | None = None
    final_rows: int | None = None
    choosing_rows: int | None = None
    rungs: Sequence[float] = ()
    tokens: float | None = None
    whole_tokens: float | None = None
    seconds: float | None = None
    stream_seconds: float | None = None
    base_token_ms: float | None = None
    unmeasured: str = ""

    @property
    def live(self) -> bool:
        """Whether it has not come to its end."""
        return self.status in LIVE

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric in HIGHER


def read_race(folder: Path, result: Mapping[str, Any], record: Mapping[str, Any]) -> Race:
    """The race in `folder`: `result` is what race.json holds, or would hold by now, and `record` what run.json holds.
    Every field of both may be missing."""
    metric = str(result.get("metric") or record.get("metric") or "loss")
    listed = [own for own in result.get("contenders") or [] if isinstance(own, Mapping) and own.get("name")]
    reader = _Reader(folder, metric, record, listed, result.get("winner"))
    entrants = [reader.entrant(place, own) for place, own in enumerate(listed, 1)]
    shares = result.get("rungs") or []
    sound = all(is_number(share) and 0 < share <= 1 for share in shares)
    status = str(result.get("status") or "of unknown end")
    spent = [own.tokens for own in entrants if own.tokens is not None]
    return Race(
        status, metric, entrants, next((own for own in entrants if own.name == result.get("winner")), None),
        _number(result.get("base")), _number(result.get("final_rows")),
        _number(record.get("choosing_rows") or (record.get("data") or {}).get("choosing_rows")),
        shares if sound else (), sum(spent) if spent else None,
        None if status in LIVE else _number(result.get("whole_tokens")), _number(result.get("seconds")),
        _number(result.get("stream_seconds")), _number(result.get("base_token_ms")),
        str(result.get("latency_unmeasured") or ""),
    )  # fmt: skip


class _Reader:
    """What stands in the race's folder, and the contenders as race.json lists them."""

    def __init__(
        self, folder: Path, metric: str, record: Mapping[str, Any], listed: Sequence[Mapping[str, Any]], winner: Any
    ) -> None:
        self.metric, self.listed, self.winner = metric, listed, winner
        self.metrics = read_metrics(folder / "metrics.jsonl")
        self.entered, self.left = _events(folder / "events.jsonl")
        self.rows = {own["name"]: read_final_rows(folder / "final" / f"{own['name']}.jsonl") for own in listed}
        self.settings = {own["name"]: _settings(own, record) for own in listed}
        self.seeds = len({own.get("seed") for own in listed}) > 1

    def entrant(self, place: int, own: Mapping[str, Any]) -> Entrant:
        name, settings = own["name"], self.settings[own["name"]]
        lines = [line for line in self.metrics if line.get("learner") == name]
        held = [line["heldout"].get(self.metric) for line in lines if isinstance(line.get("heldout"), Mapping)]
        alike = [self.settings[other["name"]] for other in self.listed if other.get("method") == own.get("method")]
        against, steps = None, _latest(own, lines, "steps", "step")
        if name != self.winner:
            against = paired(self.rows[name], self.rows.get(self.winner), self.metric)
        return Entrant(
            place, name, str(own.get("method")), _title(own.get("method")), _line(own, settings, alike, self.seeds),
            _state(own, self.left.get(name), name in self.entered or bool(lines), steps), settings,
            _number(own.get("lr")), own.get("seed"), _number(own.get("score")), own.get("interval"),
            _number(own.get("choosing")), _number(held[0]) if held else None, _number(own.get("rungs")), steps,
            _number(own.get("total_steps")), _latest(own, lines, "tokens", "tokens"),
            _number(own.get("trainable_parameters")), _number(own.get("file_bytes")),
            (_number(own.get("virtual_tokens")), _number(own.get("prefix_tokens"))),
            _number(own.get("token_ms")), own.get("token_ms_quartiles"), *_training(own),
            _comparison(own.get("comparison")), against, lines, self.rows[name],
        )  # fmt: skip


def rate_text(rate: float | None) -> str:
    """A learning rate as people write it: 1e-3, 3.5e-4."""
    if not is_number(rate):
        return "–"
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def value_text(value: Any) -> str:
    """The value of a setting in few words."""
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={value_text(own)}" for name, own in value.items())
    return "+".join(map(value_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: Any) -> Any:
    return value if is_number(value) else None


def _latest(own: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], name: str, measured: str) -> Any:
    """What the record says, or the last line that was measured of a race that goes on."""
    given = _number(own.get(name))
    return given if given is not None or not lines else _number(lines[-1].get(measured))


def _training(own: Mapping[str, Any]) -> tuple[float | None, float | None, float | None, dict[str, float]]:
    """What training took: seconds, milliseconds a token, memory and its parts (MiB)."""
    seconds, token, memory = (_number(own.get(f"training_{name}")) for name in ("seconds", "token_ms", "memory_mb"))
    parts = own.get("training_memory_parts_mb")
    known = parts.items() if isinstance(parts, Mapping) else ()
    return seconds, token, memory, {str(name): value for name, value in known if is_number(value)}


def _settings(own: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The course's settings and the method's, by name."""
    plan = (record.get("plans") or {}).get(own["name"]) or {}
    course = {name: value for name, value in plan.items() if name not in APART}
    return {**course, **(own.get("config") or {})}


def _events(path: Path) -> tuple[set[str], dict[str, str]]:
    """Who entered the stream, and who left it and why; lines that cannot be read are passed over."""
    entered: set[str] = set()
    left: dict[str, str] = {}
    try:
        lines = json_lines(path)
    except OSError:
        return entered, left
    for text in lines:
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "select":
            entered |= {str(name) for name in event.get("start") or []}
            left |= {str(name): str(why) for name, why in (event.get("stop") or {}).items()}
        elif isinstance(event, dict) and event.get("event") == "ask":
            name = str(event.get("name"))
            if event.get("what") == "continue":
                left.pop(name, None)
            elif event.get("what") == "stop" and name in entered:
                left.setdefault(name, "stopped by hand")
    return entered, left


def _state(own: Mapping[str, Any], left: str | None, entered: bool, steps: int | None) -> str:
    """The record's word; events and steps know more while a race goes on."""
    said, total = str(own.get("status") or "waiting"), own.get("total_steps")
    if said not in ("waiting", "running"):
        return said
    if steps is not None and is_number(total) and steps >= total:
        return "done"
    return left or ("running" if entered else said)


def _comparison(found: Any) -> Comparison | None:
    if not isinstance(found, Mapping) or not is_number(found.get("difference")):
        return None
    interval, better = found.get("interval") or [], found.get("better")
    ends = (float(interval[0]), float(interval[1])) if len(interval) == 2 and all(map(is_number, interval)) else None
    rows = found.get("rows")
    return Comparison(
        str(found.get("metric") or "loss"), float(found["difference"]), ends, rows if isinstance(rows, int) else 0,
        better if isinstance(better, bool) else None,
    )  # fmt: skip


# ---- words


def _title(method: Any) -> str:
    return METHODS[method].title if method in METHODS else str(method or "–")


def _line(own: Mapping[str, Any], settings: Mapping[str, Any], alike: Sequence[Mapping[str, Any]], seeds: bool) -> str:
    """What tells it from others of its method, and what is not the method's default: "r=8 all-linear, lr 1e-3"."""
    method = str(own.get("method"))
    usual = {each.name: each.default for each in fields_of(METHODS[method])} if method in METHODS else {}
    words = []
    for name in sorted(settings, key=lambda name: SHOWN.index(name) if name in SHOWN else len(SHOWN)):
        value = settings[name]
        varied = any(name not in other or other[name] != value for other in alike)
        changed = name in usual and _plain(usual[name]) != _plain(value)
        shown = name in SHOWN and value not in (None, 0, [], "")
        if varied or changed or shown:
            words.append(value_text(value) if name == "targets" else f"{name}={value_text(value)}")
    seed = [f"seed {own.get('seed')}"] if seeds else []
    return ", ".join(filter(None, [" ".join(words), f"lr {rate_text(own.get('lr'))}", *seed]))


def _plain(value: Any) -> Any:
    """Values as JSON gives them back."""
    return list(value) if isinstance(value, tuple) else value
