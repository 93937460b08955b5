"""inlay convert"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from inlay.formats.support import CONVERSIONS
from inlay.runs.settings import as_path
from inlay.values import Checked, Count, From, Help, OneOf, Positive

from . import flags
from .common import console, emit, number


def as_switches(value: Any) -> Any:
    """`true,false,true` as a list of them."""
    if isinstance(value, str):
        value = [part.strip().lower() for part in value.split(",")]
    words = {"true": True, "false": False, "1": True, "0": False}
    if not isinstance(value, Sequence) or not all(str(part).lower() in words for part in value):
        raise ValueError("Write true,false,true: one for each part of the fused weight.")
    return [words[str(part).lower()] for part in value]


@dataclass(frozen=True, kw_only=True)
class Convert(Checked):
    """What is written as what."""

    adapter: Annotated[str, Help("an adapter's folder, its run's, or a file with a loralib state dict")]
    to: Annotated[
        str,
        OneOf(tuple(CONVERSIONS), "format"),
        Help("peft and adapterhub: a folder; loralib: a file; lora: any as LoRA; vllm: the same as vLLM opens it"),
    ]
    out: Annotated[str, From(as_path), Help("a new folder, or for loralib a new .safetensors or .pt file")]
    base: Annotated[str | None, Help("the base it was trained on, where its files do not name it")] = None
    rank: Annotated[Count | None, Help("make LoRA of this rank of it: the nearest one, its error said")] = None
    alpha: Annotated[Positive | None, Help("of a loralib file, which does not hold it")] = None
    enabled: Annotated[
        Sequence[bool] | None, From(as_switches), Help("loralib: which parts of fused weights are adapted")
    ] = None


@flags.command(Convert, "converting")
def command(given: Convert, as_json: bool) -> None:
    """Write an adapter in another library's format, and say how far its logits are from what they were.

    inlay convert --adapter runs/reviews --to adapterhub --out hub

    inlay convert --adapter runs/dora --to lora --rank 16 --out as_lora

    inlay convert --adapter runs/reviews --to vllm --out reviews
    """
    with console.status("converting"):
        from inlay.merging.convert import convert_to

        found = convert_to(given.to, given.adapter, given.out, given.base, given.rank, given.alpha, given.enabled)
    if as_json:
        return emit(found, True)
    out = Console(highlight=False)
    out.print(f"converted adapter  {found['written']}  ({found['format']})", markup=False, soft_wrap=True)
    out.print(
        f"its logits         at most {number(found['max_difference'])} from those of {given.adapter}, "
        f"where the largest is {number(found['largest_logit'])}", markup=False, soft_wrap=True,
    )  # fmt: skip
    if "alpha" in found:
        out.print(f"its alpha          {found['alpha']:g}, which the file does not hold", markup=False)
    if "rank" in found:
        out.print(
            f"its rank           {found['rank']}; of each module's change it leaves out at most "
            f"{found['error_largest']:.2%} ({found['error_worst_module']}), {found['error_mean']:.2%} on average",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if "command" in found:
        _told_of_vllm(out, found)


def _told_of_vllm(out: Console, found: Mapping[str, Any]) -> None:
    out.print(f"to serve it        {found['command']}", markup=False, soft_wrap=True)
    out.print(f"its rules          those of {found['rules']}'s loader hold; vLLM itself was not run", markup=False)
    if found["template"]:
        said = "vLLM does not know the adapter's template (in inlay.json): put prompts into its words yourself"
        out.print(f"its template       {said}", markup=False, soft_wrap=True)
