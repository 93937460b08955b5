"""All that there is to say of one adapter, as one JSON object; what needs rows comes where there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.bank.adapter import Adapter, Part
from inlay.bank.bank import Bank
from inlay.bank.variants import changed_part
from inlay.bases.heads import can_write
from inlay.errors import InlayError, UsageError
from inlay.evaluation.compare import compare
from inlay.evaluation.rows import RowScores
from inlay.evaluation.score import Items, score
from inlay.runtime.memory import TokenBudget
from inlay.values import fields_of

from .altered import watched
from .altering import heads_alone, lower_ranks, replaces_module, shuffled, without_layers, without_tokens
from .attention import attention_on_tokens
from .effects import effects
from .finding import Finding
from .rows import calibration_error, first_moves, row_changes, row_words, token_calibration
from .spectra import Spectrum, dense_spectra, spectra, summary
from .start import started
from .token_words import about_attention, about_tokens
from .tokens import look_at_tokens, token_parts, written_alone
from .units import Activity, has_units
from .words import (
    about_calibration,
    about_directions,
    about_layers,
    about_norms,
    about_ranks,
    about_scales,
    about_score,
    about_units,
)

__all__ = ["Inspected", "inspect"]


@dataclass
class Inspected:
    """What was measured, as JSON; `findings` in words; `notes` on what cannot be; `rows` are what the adapter scored on
    each row."""

    measures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: RowScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.measures, "findings": [one.to_dict() for one in self.findings], "notes": self.notes}

    def say(self, *found: Finding | None) -> None:
        self.findings += [one for one in found if one is not None]


@dataclass(frozen=True)
class _Rows:
    items: Items
    budget: TokenBudget
    scored: Mapping[str | None, RowScores]
    gain: float


def inspect(
    bank: Bank, name: str, folder: Path, tokenizer: Any, items: Items | None = None, budget: TokenBudget | None = None,
    fresh: bool = False, on_part: Callable[[str], None] = lambda part: None,
) -> Inspected:  # fmt: skip
    """Look at the adapter `name` of a bank, which was read from `folder`; `fresh` is whether the base's own head was
    drawn at random, so that the base has no score. `on_part` hears what is being done.

    Bank and base are as before afterwards. Raises: UsageError, InlayError as scoring does.
    """
    adapter, found = bank.adapters[name], Inspected()
    found.measures |= {"methods": [method.title for method in adapter.methods], "parameters": len(adapter)}
    rows = None
    if items is not None and budget is not None:
        on_part("scoring")
        rows = _scored(bank, name, items, budget, fresh, found)
    on_part("virtual tokens")
    _tokens(bank, adapter, folder, tokenizer, rows, found)
    on_part("weights")
    _weights(bank, adapter, rows, found)
    on_part("layers")
    _layers(bank, adapter, rows, found)
    _units(bank, adapter, rows, found)
    if rows is not None:
        on_part("rows")
        _changes(bank, name, tokenizer, rows, found)
    _nothing(found, rows)
    return found


def _scored(bank: Bank, name: str, items: Items, budget: TokenBudget, fresh: bool, found: Inspected) -> _Rows:
    made = score(bank, items, [name] if fresh else [None, name], budget)
    scored = {route: one.rows for route, one in made.items()}
    scores = {"base" if route is None else "adapter": one.scores for route, one in made.items()}
    found.measures |= {"rows": len(scored[name]), "scores": scores}
    found.rows = scored[name]
    gain = 0.0
    if fresh:
        gain = _beyond_head(bank, name, items, budget, scored, found)
    else:
        told = compare(scored[name], scored[None], "loss")
        found.measures["against_base"] = told.to_dict()
        gain = -told.difference if told.better else 0.0
        found.say(about_score(told.to_dict(), told.rows))
    return _Rows(items, budget, scored, gain)


def _beyond_head(
    bank: Bank, name: str, items: Items, budget: TokenBudget, scored: Mapping[str | None, RowScores], found: Inspected
) -> float:
    """The gain of an adapter over its trained head alone, where the base's own was drawn at random."""
    found.notes.append("The base's own head was drawn at random: there is no base to compare with.")
    heads = heads_alone(bank.adapters[name])
    if not heads:
        return 0.0
    told = effects(bank, name, items, {f"{name}'s head": heads}, budget, scored)[f"{name}'s head"]
    found.measures["head_alone"] = told
    return told["difference"] if told["better"] is False else 0.0


def _effects(
    bank: Bank, adapter: Adapter, rows: _Rows | None, made: Mapping[Any, Sequence[Part]]
) -> dict[Any, dict[str, Any]]:
    """By the keys of `made`, what the changed copies score; nothing without rows."""
    if rows is None or not made:
        return {}
    named = {f"{adapter.name} without {n}": key for n, key in enumerate(made)}
    copies = {copy: made[key] for copy, key in named.items()}
    told = effects(bank, adapter.name, rows.items, copies, rows.budget, rows.scored)
    return {named[copy]: own for copy, own in told.items()}


def _tokens(bank: Bank, adapter: Adapter, folder: Path, tokenizer: Any, rows: _Rows | None, found: Inspected) -> None:
    parts = token_parts(adapter)
    if not parts:
        return
    start, why = started(bank, folder, tokenizer)
    if start is None:
        found.notes.append(f"How far virtual tokens moved is not known: {why}.")
    removed = _effects(bank, adapter, rows, without_tokens(adapter))
    orders = [*_effects(bank, adapter, rows, shuffled(adapter)).values()]
    looks = []
    for part in parts:
        look = look_at_tokens(bank, part, tokenizer, start)
        own = {n: told for (index, n), told in removed.items() if index == part.index}
        for n, told in own.items():
            look["tokens"][n]["removed"] = told
        looks.append(look | {"shuffled": orders})
        found.say(*about_tokens(look, own.values(), orders, rows.gain if rows else 0.0, settings_of(adapter)))
    found.measures["virtual"] = looks
    if rows is not None:
        _attention(bank, adapter.name, rows, found)
    if tokenizer is not None and can_write(bank.model):
        try:
            found.measures["writes_alone"] = written_alone(bank, adapter.name, tokenizer)
        except InlayError as error:
            found.notes.append(f"What the base writes behind them alone cannot be said: {error.what}.")


def _attention(bank: Bank, name: str, rows: _Rows, found: Inspected) -> None:
    try:
        told = attention_on_tokens(bank, name, rows.items.items)
    except UsageError as error:
        found.notes.append(f"The attention that they get cannot be said: {error.what}.")
        return
    found.measures["attention"] = told
    looks = found.measures["virtual"]
    if len(looks) == 1:
        for token, share in zip(looks[0]["tokens"], told["tokens"], strict=True):
            token["attention"] = share
    found.say(about_attention(told))


def _weights(bank: Bank, adapter: Adapter, rows: _Rows | None, found: Inspected) -> None:
    told = _spectra(adapter, found)
    if not told:
        return
    short = summary(told)
    found.measures |= {"modules": [one.to_dict() for one in told], "modules_summary": dict(short)}
    found.say(about_norms(short), about_scales(told), about_directions(short))
    ranks = _effects(bank, adapter, rows, lower_ranks(adapter) if rows is not None else {})
    found.measures["ranks"] = [{"rank": rank, **own} for rank, own in ranks.items()]
    found.say(*about_ranks(short, ranks, rows.gain if rows else 0.0, settings_of(adapter)))


def _spectra(adapter: Adapter, found: Inspected) -> list[Spectrum]:
    """Of forms, or, where there are none, of whole weights that the methods give."""
    if any(part.method.has_form() for part in adapter.parts):
        return spectra(adapter)
    own = [part for part in adapter.parts if part not in token_parts(adapter) and not replaces_module(part)]
    if not any(site.kind in ("linear", "embedding", "experts") for part in own for site in part.sites.values()):
        return []
    try:
        return dense_spectra(Adapter(adapter.name, own, adapter.seed))
    except UsageError as error:
        found.notes.append(f"Its size beside the weights cannot be said: {error.what}.")
        return []


def _layers(bank: Bank, adapter: Adapter, rows: _Rows | None, found: Inspected) -> None:
    layers = _effects(bank, adapter, rows, without_layers(adapter) if rows is not None else {})
    if layers:
        found.measures["layers"] = [{"layer": block, **own} for block, own in layers.items()]
        found.say(*about_layers(layers, rows.gain if rows else 0.0, settings_of(adapter)))


def _units(bank: Bank, adapter: Adapter, rows: _Rows | None, found: Inspected) -> None:
    if not has_units(adapter.parts):
        return
    if rows is None:
        found.notes.append("Which units of its bottlenecks are at work is seen on rows: give --data.")
        return
    activity = Activity()
    made = [changed_part(part, watched(part.method, activity.hear)) for part in adapter.parts]
    _effects(bank, adapter, rows, {"watched": [part for part in made if part is not None]})
    sites = [*activity.sites()]
    found.measures["units"] = sites
    found.say(about_units(sites, settings_of(adapter)))


def _changes(bank: Bank, name: str, tokenizer: Any, rows: _Rows, found: Inspected) -> None:
    own, base = rows.scored[name], rows.scored.get(None)
    _calibration(bank, name, rows, found)
    if base is None:
        return
    changes, words = row_changes(base, own), row_words(rows.items.items, tokenizer)
    found.measures["changed_rows"] = {
        key: [{**row, "text": words.get(int(row["row"]), "")} for row in listed] for key, listed in changes.items()
    }
    if rows.items.task == "generate":
        found.measures["moved_words"] = first_moves(bank, name, rows.items.items, tokenizer, rows.budget)


def _calibration(bank: Bank, name: str, rows: _Rows, found: Inspected) -> None:
    """Of labels, or where there are none, of the answers' tokens."""
    error, count, of = calibration_error(rows.scored[name]), len(rows.scored[name]), "labels"
    base = rows.scored.get(None)
    of_base = None if base is None else calibration_error(base)
    if error is None and rows.items.task == "generate":
        names = [name] if base is None else [name, None]
        errors, count = token_calibration(bank, names, rows.items.items, rows.budget)
        error, of_base, of = errors.get(name), errors.get(None), "tokens"
    if error is not None:
        found.measures["calibration"] = {"base": of_base, "adapter": error, "of": of, "count": count}
        found.say(about_calibration(of_base, error, count, settings_of(bank.adapters[name]), of))


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """The settings that a method takes, by name; none where an adapter has several parts, whose settings may clash."""
    method = adapter.method
    return {} if len(adapter.parts) > 1 else {own.name: getattr(method, own.name) for own in fields_of(type(method))}


def _nothing(found: Inspected, rows: _Rows | None) -> None:
    """A method without words, products or units is looked at by its rows alone."""
    if rows is None and not {"virtual", "modules"} & set(found.measures):
        titles = " and ".join(found.measures["methods"])
        found.notes.append(
            f"{titles} has no virtual tokens and no products of weights: give --data to see what it does."
        )
    elif rows is None:
        found.notes.append("Layers, lower ranks, rows and words are looked at where there are rows: give --data.")
