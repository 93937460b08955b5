"""inlay merge"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console

from inlay.runs.settings import Base, Dtype, as_path
from inlay.values import Checked, From, Help

from . import flags
from .common import console, emit, number


@dataclass(frozen=True, kw_only=True)
class Merge(Checked):
    """What is merged into what."""

    adapter: Annotated[str, Help("an adapter's folder, or its run's")]
    out: Annotated[str, From(as_path), Help("a new folder for the merged model")]
    base: Base = "smollm2"
    dtype: Annotated[Dtype, Help("number format of the merged model; auto keeps the base's own")] = "float32"


@flags.command(Merge, "merging")
def command(given: Merge, as_json: bool) -> None:
    """Write base and adapter as one plain transformers model, and say how far its logits are from theirs.

    inlay merge --adapter runs/reviews --out merged
    """
    with console.status("merging"):
        from inlay.merging.merge import merge_to_folder

        result = merge_to_folder(given.base, given.adapter, given.out, given.dtype)
    if as_json:
        return emit(result, True)
    out = Console(highlight=False)
    out.print(f"merged model  {result['merged']}  ({result['dtype']})", markup=False, soft_wrap=True)
    out.print(
        f"its logits    at most {number(result['max_difference'])} from those of base and adapter, "
        f"where the largest is {number(result['largest_logit'])}"
    )
