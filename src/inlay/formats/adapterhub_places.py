"""By which names AdapterHub reaches the parts of a block: what a file that is written here must say.

Reading needs none of this; see `inlay.formats.adapterhub_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from inlay.errors import FormatError, UsageError
from inlay.methods.contract import Site, Structure

from .adapterhub_keys import MATRICES

__all__ = ["Places", "check_compared", "places_of"]


@dataclass(frozen=True)
class Places:
    """Paths inside of a block: where bottlenecks behind attention and the feed-forward part are held, and the layers
    that its settings `intermediate_lora` and `output_lora` speak of.

    What it reaches by hooks alone (`hooked`) has no prefixes, and no bottleneck that a block goes on with. In models of
    an `other_stream` it computes the stream behind a sublayer otherwise than their blocks do: behind one norm more, or
    without the part beside it.

    `factors` names, by a layer that reads what the product of two others is, the one of those that nothing acts on
    before they are multiplied: to scale what the one reads is to scale what the other gives.
    """

    attention: str
    mlp: str
    intermediate: str
    output: str
    hooked: bool = False
    other_stream: bool = False
    factors: Mapping[str, str] = field(default_factory=dict[str, str])

    def matrix(self, site: Site, inner: str) -> str:
        """What LoRAConfig calls the linear layer at `inner` inside of a block; "" where it has no word for it."""
        if site.part == "attention" and site.role in MATRICES:
            return site.role
        return {self.intermediate: "intermediate", self.output: "output"}.get(inner, "")


BESIDE = ("attention_adapters", "output_adapters")
"""Modules of AdapterHub's own in each block."""
WITHIN = ("attention.output", "output")
"""The modules of BERT's family that add to the residual stream."""
BERT = Places(*WITHIN, "intermediate.dense", "output.dense")
PRODUCT = {"mlp.down_proj": "mlp.up_proj"}
GATED = Places(*BESIDE, "mlp.down_proj", "mlp.up_proj", factors=PRODUCT)
"""The feed-forward part of Llama, as AdapterHub calls its layers: what its first layer is called goes to the last."""

PLUGGED = Places(*BESIDE, "mlp.up_proj", "mlp.down_proj", hooked=True, factors=PRODUCT)

KNOWN: Mapping[str, Places] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), BERT),
    **dict.fromkeys(("llama", "mistral"), GATED),
    "gpt2": Places(*BESIDE, "mlp.c_fc", "mlp.c_proj"),
    **dict.fromkeys(("qwen2", "qwen3"), PLUGGED),
    "gemma2": replace(PLUGGED, other_stream=True),
    "phi": Places(*BESIDE, "mlp.fc1", "mlp.fc2", hooked=True, other_stream=True),
}
"""By transformers' `model_type`."""
READ_TOO = ("t5",)
"""Those whose bottlenecks were compared too, but are not written."""


def check_compared(base: Structure, what: str, where: str, behind: bool = False) -> None:
    """Raises: FormatError where it was not compared with AdapterHub what it does in this kind of model: the same name
    stands for other places of a block in others. `behind` is whether it reads the stream behind the sublayer.
    """
    kind = _kind(base)
    if kind not in KNOWN and kind not in READ_TOO:
        known = ", ".join((*KNOWN, *READ_TOO))
        why = f"{what} of AdapterHub's in a {kind} model, where nobody has compared what they are"
        raise FormatError(f"{where} holds {why}", f"Compared are {known}. Load it with AdapterHub.")
    if behind and kind in KNOWN and KNOWN[kind].other_stream:
        why = f"{what} with original_ln_before, which AdapterHub computes otherwise in a {kind} model"
        raise FormatError(f"{where} holds {why}", "Load it with AdapterHub.")


def _kind(base: Structure) -> str:
    return str(getattr(getattr(base.model, "config", None), "model_type", ""))


def places_of(base: Structure) -> Places:
    """Raises: UsageError where AdapterHub does not know the base's kind of model, or it is not known here how."""
    kind = _kind(base)
    found = KNOWN.get(kind)
    if found is None:
        what = f"it is not known here how AdapterHub names the parts of a {kind or type(base.model).__name__} model"
        raise UsageError(what, f'Known are {", ".join(KNOWN)}. Save it with format="peft".')
    return found
