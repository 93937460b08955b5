"""The page of what an adapter has learned, one file without outside assets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from inlay.files import write_text

from .inspect_charts import Heat, changes, heat
from .naming import named
from .report import page_environment
from .words import breakable, is_number, number, printable, score_text

__all__ = ["inspect_page", "write_inspect_page"]


def write_inspect_page(path: Path, result: Mapping[str, Any]) -> Path:
    """Write what `inlay inspect` found to `path`."""
    write_text(path, inspect_page(result))
    return path


def inspect_page(result: Mapping[str, Any]) -> str:
    """The page of `result`, the object that `inlay inspect --json` prints, of one adapter or of two. Every field may be
    missing."""
    pages = [_page(own) for own in result.get("adapters") or [result]]
    pair = [_finding(one) for one in (result.get("comparison") or {}).get("findings", ())]
    title = pages[0]["title"] if len(pages) == 1 else "Two adapters beside one another"
    context = {"title": title, "pages": pages, "pair": pair}
    return printable(page_environment().get_template("inspect.html.jinja").render(context))


def _page(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one adapter."""
    return {
        "title": f"What {' and '.join(result.get('methods', ())) or 'the adapter'} learned",
        "subtitle": _subtitle(result),
        "findings": [_finding(one) for one in result.get("findings", ())],
        "notes": [*map(str, result.get("notes", ()))],
        "scores": _scores(result),
        "charts": _charts(result),
        "virtual": [_virtual(look) for look in result.get("virtual", ())],
        "attention": _attention(result.get("attention") or {}),
        "writes": result.get("writes_alone"),
        "heat": heat(result.get("modules", ())),
        "moved": [(key, _moved(own)) for key, own in (result.get("moved_words") or {}).items() if own],
        "changed": [(key, _rows(own)) for key, own in (result.get("changed_rows") or {}).items() if own],
        "units": [(own["path"], number(own["units"]), number(own["dead"])) for own in result.get("units", ())],
    }


def _subtitle(result: Mapping[str, Any]) -> list[Markup | str]:
    parts: list[Markup | str] = []
    if result.get("base"):
        parts.append(breakable(named(str(result["base"])).name))
    if result.get("adapter"):
        parts.append(breakable(result["adapter"]))
    if is_number(result.get("parameters")):
        parts.append(f"{number(result['parameters'])} parameters")
    return [*parts, f"{number(result['rows'])} rows" if result.get("rows") else "no rows: parameters alone"]


def _finding(one: Mapping[str, Any]) -> dict[str, Any]:
    tone = "even" if one.get("noise") else "warn" if one.get("try") else "good"
    return {"about": one["about"], "words": one["words"], "then": one.get("try", ""), "tone": tone}


def _scores(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Metrics of the base and the adapter, and the errors of their probabilities."""
    scores = result.get("scores") or {}
    base, own = scores.get("base") or {}, scores.get("adapter") or {}
    lines = [(name.replace("_", " "), score_text(base.get(name)), score_text(own[name])) for name in own]
    off = result.get("calibration") or {}
    return (
        [*lines, ("calibration error", score_text(off.get("base")), score_text(off.get("adapter")))] if off else lines
    )


def _charts(result: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """Title, what it shows, and picture."""
    found = []
    for key, name, title, words in (
        ("ranks", "rank", "Cut to lower ranks", "What the loss gains where all products are cut to a rank."),
        ("layers", "layer", "Without each layer", "Each block's part left out alone, all in the same forwards."),
    ):
        told = result.get(key) or ()
        if picture := changes(title, [(f"{name} {own[name]}", own) for own in told]):
            found.append((title, words, Markup(picture)))
    for look in result.get("virtual", ()):
        told = [(f"token {own['index']}", own["removed"]) for own in look["tokens"] if own.get("removed")]
        told += [(f"shuffled {n}", own) for n, own in enumerate(look.get("shuffled", ()), 1)]
        if picture := changes("Without each virtual token", told):
            words = "Each token left out alone, and all of them in another order."
            found.append(("Without each virtual token", words, Markup(picture)))
    return found


def _virtual(look: Mapping[str, Any]) -> dict[str, Any]:
    lines, noun = [], "key" if look["kind"] == "prefix" else "token"
    for own in look["tokens"]:
        near = [(repr(one["word"]), f"{one['cosine']:.2f}") for one in own.get("nearest", ())]
        chance = own.get("chance")
        telling = is_number(chance) and chance <= 0.01
        looked = _share((own.get("attention") or {}).get("share"))
        moved = _share(own.get("moved"))
        z, norm = (f"{value:{form}}" if is_number(value) else "–" for value, form in
                   ((own.get("z"), ".1f"), (own.get("norm"), ".3g")))  # fmt: skip
        lines.append((own["index"], near, z, telling, moved, looked, norm))
    return {
        "title": f"{look['method']}: {look['count']} {noun}{'s' * (look['count'] != 1)}",
        "lines": lines, "why": look.get("no_words") or "", "similarity": score_text(look.get("similarity")),
        "number": score_text(look.get("effective_number")),
    }  # fmt: skip


def _attention(told: Mapping[str, Any]) -> Heat | None:
    """By layer and head, the share that all virtual tokens get."""
    layers = told.get("layers") or ()
    most = max((share for own in layers for share in own["heads"]), default=0.0)
    if not most:
        return None
    heads = [str(n) for n in range(max(len(own["heads"]) for own in layers))]
    lines = [(str(own["layer"]), [(f"{share:.0%}", share) for share in own["heads"]]) for own in layers]
    return Heat(heads, lines)


def _share(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def _moved(words: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(repr(own["word"]), score_text(own["base"]), score_text(own["adapter"])) for own in words]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [(own["text"], score_text(own["base"]), score_text(own["adapter"])) for own in rows]
