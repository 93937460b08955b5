"""What a method costs on a base of the usual one's shape, counted on random weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from inlay.errors import InlayError
from inlay.methods.contract import Method

__all__ = ["Cost", "cost_of"]

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
"""SmolLM2-135M's."""


@dataclass(frozen=True)
class Cost:
    """`trained` numbers of an adapter beside `base` of the base; `tokens` of a row's context that it takes; whether it
    `merges` into a plain model. `why` says why nothing could be counted, with zeros then."""

    trained: int
    base: int
    tokens: int
    merges: bool
    why: str = ""

    def words(self) -> str:
        if self.why:
            return f"on SmolLM2-135M nothing can be counted: {self.why}"
        said = f"trains {self.trained:,} numbers on SmolLM2-135M, {100 * self.trained / self.base:.3f} % of the base"
        said += f"; takes {self.tokens} tokens of every row's context" if self.tokens else ""
        return f"{said}; {'merges into a plain model' if self.merges else 'stays beside the base: it does not merge'}"


def cost_of(method: Method) -> Cost:
    """Count the parameters of an adapter of `method`; takes seconds, for a random base has to be made."""
    parts = method.parts()
    tokens = sum(part.prefix_length + part.virtual_length for part in parts)
    merges = all(type(part).has_form() or type(part).has("merge") for part in parts)
    bank = _bank()
    base = sum(p.numel() for p in bank.model.parameters())
    try:
        adapter = bank.add("it", method, seed=0)
        trained = sum(p.numel() for p in adapter.parameters())
    except InlayError as error:  # it needs what only a user has: other adapters, tokens, biases
        return Cost(0, base, tokens, merges, str(error))
    finally:
        if "it" in bank.adapters:
            bank.remove("it")
    return Cost(trained, base, tokens, merges)


@cache
def _bank() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from inlay.bank.bank import attach

    return attach(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval())  # pyright: ignore[reportArgumentType]
