"""inlay eval"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from inlay.runs.settings import (
    Paths,
)  # fmt: skip
from inlay.values import From, Help

from . import flags
from .common import console, emit, scores_table
from .opening import Reading, as_folders, dropped, open_bank

if TYPE_CHECKING:
    from inlay.data.prompting import Prompting
    from inlay.data.table import Table


@dataclass(frozen=True, kw_only=True)
class Eval(Reading):
    """What is scored on what."""

    data: Paths
    adapter: Annotated[Sequence[str], From(as_folders), Help("an adapter's folder or its run's; repeatable")] = ()


@flags.command(Eval, "scoring")
def command(given: Eval, as_json: bool) -> None:
    """Score adapters and the plain base on the same rows, in the same pass.

    inlay eval --data test.csv --adapter runs/reviews
    """
    from inlay.bases.adapters import adapter_folder
    from inlay.data.prompting import prompting_for
    from inlay.data.table import read_table

    folders = {name: adapter_folder(name) for name in given.adapter}
    table = read_table(given.data, given.split)
    prompting = prompting_for(table, [*folders.values()], given.template, given.verbalizer, given.columns)
    if given.max_length is not None:
        prompting = replace(prompting, max_length=given.max_length)
    with console.status("scoring"):
        result = _scored(given, folders, table, prompting)
    if as_json:
        emit(result, True)
        return
    scores = {"base": (result["base"], result["intervals"]["base"])} if result["base"] else {}
    for name, shown in _short(result["adapters"]).items():
        scores[shown] = (result["adapters"][name], result["intervals"]["adapters"][name])
    Console(highlight=False).print(scores_table(scores, result["rows"]))


def _short(folders: Iterable[str]) -> dict[str, str]:
    """Each folder by its last name, that of its run where it lies in one, as long as all differ."""
    names = {}
    for folder in folders:
        path = Path(folder)
        names[folder] = (path.parent.name if path.name == "adapter" else path.name) or folder
    return names if len({*names.values(), "base"}) == len(names) + 1 else {folder: folder for folder in names}


def _scored(given: Eval, folders: dict[str, Path], table: Table, prompting: Prompting) -> dict[str, Any]:
    """Rows, and the metrics of the base and of each adapter, with their intervals."""
    from inlay.data.table import shuffled
    from inlay.evaluation.score import items_of, score
    from inlay.runtime.memory import TokenBudget

    rows = table.rows if given.limit is None else shuffled(table.rows, given.seed)[: given.limit]
    opened = open_bank(given, folders, prompting)
    items = items_of(opened.encoder, rows)
    for line in dropped(items.counts):
        console.print(line, highlight=False)
    device = next(opened.bank.model.parameters()).device
    names: list[str | None] = [*([] if opened.fresh else [None]), *folders]
    if opened.fresh:
        console.print("the base's own head was drawn at random: it is not scored", highlight=False)
    found = score(opened.bank, items, names, TokenBudget(given.tokens_at_once, device=device))
    named = {str(name): scored for name, scored in found.items() if name is not None}
    base = found.get(None)
    return {
        "rows": len(items),
        "base": {} if base is None else base.scores,
        "adapters": {name: scored.scores for name, scored in named.items()},
        "intervals": {
            "base": {} if base is None else base.intervals,
            "adapters": {name: scored.intervals for name, scored in named.items()},
        },
    }
