"""report.html of a race: who is best and why, what each setting did and what it cost, in one page without outside
assets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from inlay.evaluation.compare import Comparison
from inlay.files import write_text

from .naming import named
from .race_advice import advice, apart, standing
from .race_charts import LATENCY, PARAMETERS, Axis, curves, front, scatter
from .race_costs import costs
from .race_effects import Pair, effects, pairs
from .race_entrants import Entrant, Race, read_race
from .report import page_environment
from .words import breakable, interval_text, number, printable, score_text

__all__ = ["race_page", "write_race_page"]

PAIRS = 40
"""At most, in the table of pairs: each takes a bootstrap."""
TITLES = {
    PARAMETERS.name: ("trained parameters", "with as few parameters"),
    LATENCY.name: ("latency a token", "in as little time a token"),
}
"""What the scores are drawn against, and what those on the front have at most."""


@dataclass(frozen=True)
class Row:
    """A contender as the tables show it, in texts."""

    place: int
    name: str
    line: Sequence[str]
    state: str
    score: str
    within: str
    choosing: str
    parameters: str
    tokens: str
    steps: str
    base: tuple[str, str]
    winner: tuple[str, str]
    won: bool


@dataclass(frozen=True)
class Scatter:
    """Scores against a cost: the picture, what the front's contenders have `as_little` of, and their names."""

    title: str
    svg: Markup
    as_little: str
    front: Sequence[str]
    names: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Rung:
    """A rung in texts: after which share of a course it stands, how many came to it, and who left there."""

    number: int
    share: str
    steps: str
    came: str
    left: Sequence[tuple[str, str]]


def write_race_page(folder: Path, result: Mapping[str, Any], command: Sequence[str] = ()) -> Path:
    """Write `folder`/report.html; see `race_page`."""
    path = folder / "report.html"
    write_text(path, race_page(folder, result, command))
    return path


def race_page(folder: Path, result: Mapping[str, Any] | None = None, command: Sequence[str] = ()) -> str:
    """The page of the race in `folder`, whose files may be those of a race that is still running.

    `result` is what race.json holds, or would hold by now: it is read where it is not given. `command` are the
    arguments of the shell command that repeats the race. Every field of the files may be missing.
    """
    record = _read(folder / "run.json")
    result = _read(folder / "race.json") if result is None else result
    race, config = read_race(folder, result, record), record.get("config") or {}
    rows, compared = [_row(race, own) for own in race.entrants], [*islice(pairs(race), PAIRS + 1)]
    context = {
        "title": _title(race, config), "subtitle": _subtitle(race, config), "race": race, "verdict": advice(race),
        "links": [] if race.live else _links(folder),
        "notices": _notices(result, record),
        "scatters": [found for axis in (PARAMETERS, LATENCY) if (found := _scatter(race, axis)) is not None],
        "unmeasured": race.unmeasured, "base_token": _milliseconds(race.base_token_ms),
        "timed": any(own.token_ms is not None for own in race.entrants),
        "charts": [(title, Markup(svg)) for title, svg in curves(race)],
        "rows": rows, "costs": costs(race), "stream": number(race.stream_seconds),
        "scored": any(own.score is not None for own in race.entrants),
        "base": score_text(race.base), "metric": race.metric.replace("_", " "),
        "direction": "more" if race.higher else "less",
        "final": _counted(race.final_rows, "final row"), "choosing": _counted(race.choosing_rows, "choosing row"),
        "compared": any(own.base is not None or own.winner is not None for own in race.entrants),
        "comparisons": sum((own.base is not None) + (own.winner is not None) for own in race.entrants),
        "effects": effects(race) if _any_scores(race) else [], "pairs": [_pair(pair) for pair in compared[:PAIRS]],
        "more_pairs": len(compared) > PAIRS, "rungs": _rungs(race), "facts": _facts(race, record),
        "command": [shlex.quote(part) for part in command], "next": _next(folder, race, config),
    }  # fmt: skip
    return printable(page_environment().get_template("race.html.jinja").render(context))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; nothing where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _title(race: Race, config: Mapping[str, Any]) -> str:
    on = f" on {named(str(config['base'])).short}" if config.get("base") else ""
    return f"Race of {_counted(len(race.entrants), 'contender')}{on}"


def _subtitle(race: Race, config: Mapping[str, Any]) -> list[Markup | str]:
    parts: list[Markup | str] = [race.status]
    if config.get("base"):
        parts.append(breakable(named(str(config["base"])).name))
    return parts + [breakable(Path(str(file)).name) for file in config.get("data") or []]


def _links(folder: Path) -> list[tuple[str, str]]:
    names = {"adapter": "adapter/", "card": "adapter/README.md", "all adapters": "adapters/", "final rows": "final/"}
    names |= {name: name for name in ("race.json", "run.json", "metrics.jsonl", "events.jsonl")}
    return [(name, target) for name, target in names.items() if (folder / target).exists()]


def _notices(result: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What was said when the race was planned, so of contenders that were left out, and since."""
    return [*map(str, [*(result.get("planned") or []), *(result.get("notices") or record.get("notices") or [])])]


def _any_scores(race: Race) -> bool:
    """Whether a contender has come to a rung, or to the end."""
    return any(own.first is not None or own.score is not None for own in race.entrants)


def _counted(count: float | None, noun: str) -> str:
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


# ---- contenders


def _scatter(race: Race, axis: Axis) -> Scatter | None:
    """None where nothing can be drawn."""
    if not (svg := scatter(race, axis)):
        return None
    title, as_little = TITLES[axis.name]
    drawn = [(own.place, own.name) for own in race.entrants if own.score is not None and axis.of(own) is not None]
    return Scatter(title, Markup(svg), as_little, [own.name for own in front(race, axis)], drawn)


def _row(race: Race, own: Entrant) -> Row:
    steps = "–" if own.steps is None else f"{number(own.steps)} of {number(own.total)}"
    won = race.winner is own
    return Row(
        own.place, own.name, f"{own.title} {own.line}".split(), own.state, score_text(own.score),
        interval_text(own.interval), score_text(own.choosing), number(own.parameters),
        number(own.tokens), steps, _against(own.base),
        ("", "") if won else _against(own.winner), won,
    )  # fmt: skip


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _against(found: Comparison | None) -> tuple[str, str]:
    return ("" if found is None else apart(found), standing(found))


def _pair(pair: Pair) -> tuple[str, str, str, str, str]:
    words, names = f"{apart(pair.found)}: {standing(pair.found)}", f"{pair.names[0]} → {pair.names[1]}"
    steps = " and ".join(dict.fromkeys(map(number, pair.steps)))
    one, other = pair.steps
    if one is not None and other is not None and one != other:
        words += f", with {'more' if other > one else 'fewer'} steps"
    return pair.setting, pair.change, names, steps, words


# ---- what it took


def _rungs(race: Race) -> list[Rung]:
    """Each rung, with those who left at it; the others that left, before the first one or between two, come last."""
    made, gone = [], dict[int, list[tuple[str, str]]]()
    stray: list[tuple[str, str]] = []
    for own in race.entrants:
        if own.state.startswith("dropped at rung ") and (own.rungs or 0) in range(1, len(race.rungs) + 1):
            gone.setdefault(own.rungs or 0, []).append((own.name, own.state.partition(": ")[2]))
        elif own.state not in ("done", "running", "waiting"):
            stray.append((own.name, own.state))
    for n, share in enumerate(race.rungs, 1):
        totals = [own.total for own in race.entrants if own.total is not None]
        steps = sorted({max(1, round(share * total)) for total in totals})
        words = "–" if not steps else number(steps[0]) + (f" to {number(steps[-1])}" if len(steps) > 1 else "")
        known = all(own.rungs is not None for own in race.entrants)
        came = number(sum((own.rungs or 0) >= n for own in race.entrants)) if known else "–"
        whole = "the end" if share == 1 else f"1/{1 / share:.3g} of the course"
        made.append(Rung(n, whole, words, came, gone.get(n, [])))
    return made + ([Rung(0, "elsewhere", "–", "–", stray)] if stray else [])


def _facts(race: Race, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tokens, time and memory of the race in all, against training all to the end."""
    found = [("Contenders", number(len(race.entrants))), ("Tokens trained on", number(race.tokens))]
    if race.whole_tokens and race.tokens:
        found.append(("To train all to the end, about", number(round(race.whole_tokens))))
        found.append(("Times fewer", f"{race.whole_tokens / race.tokens:.1f}"))
    seconds, scoring = race.seconds, record.get("evaluation_seconds")
    found.append(("Time", "–" if seconds is None else f"{number(seconds)} s"))
    if scoring is not None:
        found.append(("Time for scoring", f"{number(scoring)} s"))
    for name, key in (("Peak memory", "peak_memory_mb"), ("Peak GPU memory", "peak_gpu_memory_mb")):
        if record.get(key) is not None:
            found.append((name, f"{number(record[key])} MB"))
    return found


def _next(folder: Path, race: Race, config: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Commands that use the winner's adapter."""
    if race.winner is None or race.live:
        return []
    base = [] if not config.get("base") else ["--base", str(config["base"])]
    quantize = ["--quantize", str(config["quantize"])] if config.get("quantize") else []
    about = [*base, "--adapter", str(folder / "adapter")]
    commands = {
        "Say what it makes of new rows": ["predict", *about, *quantize, "--data", "rows.csv", "--out", "said.csv"],
        "Score it beside the base on other rows": ["eval", *about, *quantize, "--data", "test.csv"],
        "Write base and adapter as one model, where the method can be merged": ["merge", *about, "--out", "merged"],
    }
    return [(title, ["inlay", *map(shlex.quote, parts)]) for title, parts in commands.items()]
