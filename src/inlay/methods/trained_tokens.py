"""Trained tokens: an adapter has its own rows of the table of tokens, and of a head that is tied to it.

    x' = E'[id]        E' is the base's table with the rows of some tokens replaced
    logits'_t = E'_t h        for those tokens, where the head's weight is the table

Reference: TRAINABLE_TOKENS of HF PEFT 0.21, and `trainable_token_indices` beside its LoRA; it leaves out the bias of a
tied head, which is kept here. New tokens are rows that `model.resize_token_embeddings` made before the bank was
attached. Shapes: the rows are (tokens, hidden), and begin as the base's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.values import Help

from .contract import Method, Params, Site, Structure, Tokens
from .peft_fields import Fields

__all__ = ["TrainableTokens"]

Index = Annotated[int, Ge(0)]
KEY, BESIDE = ".trainable_tokens_delta", ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Settings: `tokens` are named by their words, which need a tokenizer, or by their `token_indices`. `targets` names
    a table other than the one that ids are looked up in. The learning rate is the best of three.
    """

    title = "Trained tokens"
    paper = "TRAINABLE_TOKENS of HF PEFT"
    peft_type = "TRAINABLE_TOKENS"
    peft_fields = Fields(read={"token_indices": [], "target_modules": None}, passed={"init_weights": True})
    placed_by_settings = True
    lr = 1e-2

    tokens: Annotated[Sequence[str] | None, Help('their words: ["<a>", "<b>"]')] = None
    token_indices: Annotated[Sequence[Index] | None, Help("their ids, without a tokenizer")] = None
    targets: Annotated[str | Sequence[str] | None, Help("the table's name; the table of ids where unset")] = None

    def with_tokenizer(self, tokenizer: Any) -> Method:
        if self.tokens is None or self.token_indices is not None:
            return self
        return replace(self, token_indices=tuple(_index(tokenizer, token) for token in self.tokens))

    def sites(self, base: Structure) -> list[Site]:
        if not self.token_indices:
            named = "are named by words, and there is no tokenizer" if self.tokens else "are not named"
            raise UsageError(f"the tokens to train {named}", "Give token_indices.")
        table, ids = _table(base, self.targets), list(self.token_indices)
        if (highest := max(ids)) >= table.in_features:
            raise UsageError(f"token_indices holds {highest}", f"{table.path} has rows 0 to {table.in_features - 1}.")
        if len(set(ids)) < len(ids):
            raise UsageError(f"token_indices holds {max(ids, key=ids.count)} twice", "Name each token once.")
        held = (*base.tables, *base.projections)
        tied = [site for site in held if getattr(site.module, "weight", None) is table.module.weight]
        usable = {site.path: site for site in (*base.embeddings, *base.projections)}
        for path in (site.path for site in tied if site.path not in usable or site.path in base.observed.unusable):
            why = base.observed.unusable.get(path, "does not give the rows of its ids")
            raise UsageError(f"{path}, which holds the tokens' rows, {why}", "Choose another method.")
        return [usable[table.path], *(usable[site.path] for site in tied if site.path != table.path)]

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        return {"rows": sites[0].weight()[list(self.token_indices or ())].clone()}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        rows, ids = params["rows"].to(y.dtype), self._ids(y)
        if not site.is_embedding:
            bias = getattr(site.module, "bias", None)
            return y.index_copy(-1, ids, F.linear(x.to(y.dtype), rows, None if bias is None else bias[ids]))
        ordered, order = ids.sort()
        place = torch.searchsorted(ordered, x).clamp(max=len(ids) - 1)
        trained = (ordered[place] == x) & (tokens.position.to(x.device) >= 0)  # virtual tokens have no row
        return torch.where(trained[:, None], F.embedding(order[place], rows) * site.table_scale, y)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        weight = site.weight()
        return {"weight": weight.index_copy(0, self._ids(weight), params["rows"].to(weight))}

    def _ids(self, like: Tensor) -> Tensor:
        return torch.tensor(list(self.token_indices or ()), device=like.device)

    # ---- checkpoints

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        shape = (len(self.token_indices or ()), sites[0].out_features)
        return {"rows": (f"base_model.model.{sites[0].path}{KEY}", shape)}

    def copied_keys(self, site: Site) -> dict[str, str]:
        return {KEY[1:]: "rows"}  # HF PEFT writes those of tied heads too

    def key_beside(self, key: str) -> str:
        return key.removesuffix(KEY) + BESIDE

    def fields_beside(self, host: Method, sites: Sequence[Site]) -> Mapping[str, Any] | None:
        there = host.peft_fields is not None and "trainable_token_indices" in host.peft_fields.read
        return {"trainable_token_indices": {sites[0].path: list(self.token_indices or ())}} if there else None

    @classmethod
    def read_beside(cls, config: Mapping[str, Any], keys: Collection[str]) -> Method | None:
        given = config.get("trainable_token_indices")
        if not given or not isinstance(given, Mapping):
            return cls(token_indices=given) if given else None
        if len({tuple(ids) for ids in given.values()}) > 1:
            raise UsageError("trainable_token_indices names other tokens for each table", "Train one table.")
        return cls(token_indices=next(iter(given.values())), targets=list(given))

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"token_indices": list(self.token_indices or ()), "target_modules": [sites[0].path]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> TrainableTokens:
        return cls(token_indices=config["token_indices"], targets=config.get("target_modules"))


def _table(base: Structure, targets: str | Sequence[str] | None) -> Site:
    """The table itself, whichever modules share its weight."""
    if targets is None:
        try:
            module: Any = base.stacks[0].get_input_embeddings()  # pyright: ignore[reportCallIssue]
        except (AttributeError, NotImplementedError):
            module = None
        found, what = [site for site in base.tables if site.module is module], "the base looks no ids up in a table"
    else:
        names = [targets] if isinstance(targets, str) else targets
        found = [s for s in base.tables if any(s.path == name or s.path.endswith("." + name) for name in names)]
        what = f"targets {targets!r} name {'several tables' if found else 'no table'} of the base"
    if not found or len({id(site.module.weight) for site in found}) > 1:
        raise UsageError(what, f"Tables: {', '.join(site.path for site in base.tables) or 'none'}.")
    return found[0]


def _index(tokenizer: Any, token: str) -> int:
    """The id of one token. Raises: UsageError where the tokenizer has none that stands for it alone."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token]] if token in vocabulary else tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    what = f"token {token!r} is not in the tokenizer's vocabulary: it is split into {len(ids)} pieces"
    raise UsageError(what, "Name tokens that it has, or add it to tokenizer and base before: resize_token_embeddings.")
