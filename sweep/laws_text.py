"""Text that is written under a route: each row's own as alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inlay.runtime.generating import generate as answers
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling

from .bases import cast
from .case import Case, Checks, each_or_all, neighbours, over
from .laws_rows import padding_moves, widened
from .samples import NEIGHBOUR
from .verdicts import BaseFails, Different, Untried, verdict_of

__all__ = ["decode", "generate"]

NEW, LONGER = 3, 6
WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 2},
    "no cache": {"num_beams": 1, "use_cache": False},
}


def generate(case: Case, names: Sequence[str]) -> Checks:
    """Greedy, with beams, and without a cache."""
    can = getattr(case.plain, "can_generate", lambda: False)()
    if not can or case.base.use in ("masked", "classify", "image", "ctc", "sound"):
        raise Untried("the class does not write text")
    return over(
        WAYS, names, lambda some, way: each_or_all(case, some, partial(_generate, case, settings=WAYS[way]))
    )  # fmt: skip


def _generate(case: Case, names: Sequence[str], settings: Mapping[str, Any]) -> Checks:
    wanted = neighbours(names)
    rows = case.base.rows(len(wanted))
    for row in rows:
        row.pop("decoder_input_ids", None)
    batch = case.base.batch(rows, "left")
    width = batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else 0
    singles = [case.base.batch([row], "left", width) for row in rows]
    shorts = [case.base.batch([row]) for row in rows]

    def written(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        length = (
            0
            if getattr(model.config, "is_encoder_decoder", False) or "input_ids" not in inputs
            else inputs["input_ids"].shape[1]
        )
        more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
        if holders := sorted({*case.base.maker.placeholders}):  # they stand for images or sounds that are not there
            more["suppress_tokens"] = holders
        with torch.no_grad():
            return model.generate(**cast(inputs, model), **more)[:, length:]

    def own() -> Tensor:
        try:
            plain = written(case.plain, batch.inputs)
            padded = [written(case.plain, single.inputs)[0] for single in singles[:3]]
            short = [written(case.plain, one.inputs)[0] for one in shorts[:3]]
        except Exception as error:
            raise BaseFails(f"the plain base: {type(error).__name__}: {str(error)[:200]}") from error
        if any(not torch.equal(plain[i], padded[i]) and not torch.equal(plain[i], short[i]) for i in range(3)):
            raise BaseFails("the plain base writes other tokens for a row in a batch than for the row alone")
        return plain

    plain = case.once(("generate", len(wanted), str(settings)), own)
    bank = case.shared([n for n in wanted if n])
    with bank.route(wanted):
        together = written(bank.model, batch.inputs)
    if not torch.equal(together[0], plain[0]):
        raise Different("the base's row writes other tokens")

    def check(index: int, name: str) -> None:
        for way in (shorts[index], singles[index]):
            with bank.route([name]):
                alone = written(bank.model, way.inputs)[0]
            if torch.equal(alone, together[index]):
                return
        fault = padding_moves(case, rows[index]) if widened(bank, wanted) else None
        raise fault or Different(f"writes {together[index].tolist()} beside others, {alone.tolist()} alone")

    return {n: verdict_of(lambda i=i, n=n: check(i, n)) for i, n in enumerate(wanted) if n and n != NEIGHBOUR}


# ---- the loop that serves and predicts


def decode(case: Case, names: Sequence[str]) -> Checks:
    """Inlay's own loop, all rows at once, against the model's `generate` with each row alone."""
    can = getattr(case.plain, "can_generate", lambda: False)()
    if not can or case.base.use != "causal" or "input_ids" not in case.base.rows(1)[0]:
        raise Untried("the class does not go on from text")
    return each_or_all(case, names, partial(_decode, case))


def _decode(case: Case, names: Sequence[str]) -> Checks:
    wanted = neighbours(names)
    rows = [{"input_ids": row["input_ids"]} for row in case.base.rows(len(wanted))]
    less = dict.fromkeys(sorted({*case.base.maker.placeholders}), -100.0)
    sampling = Sampling(max_new_tokens=LONGER, ignore_eos=True, logit_bias=less)

    def alone(model: Any, index: int, cached: bool = True, padding: int = 0) -> list[int]:
        more = {"suppress_tokens": [*less]} if less else {}
        ids = functional.pad(rows[index]["input_ids"].to(case.base.device), (padding, 0))
        mask = torch.arange(ids.shape[1], device=ids.device)[None] >= padding
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=LONGER, min_new_tokens=LONGER,
                do_sample=False, num_beams=1, use_cache=cached, eos_token_id=None, pad_token_id=0, **more,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    bank = case.shared([n for n in wanted if n])
    written: dict[int, list[int]] = {}
    requests = [Request(n, row["input_ids"][0].tolist(), sampling) for n, row in zip(wanted, rows, strict=True)]
    for token in answers(bank, requests):
        if token.error is not None:
            raise token.error
        written.setdefault(token.request, []).append(token.id)

    def check(index: int) -> None:
        with bank.route([wanted[index]]):
            expected = alone(bank.model, index)
            if written[index] != expected:
                fault = _own_fault(bank.model, rows[index]["input_ids"], expected, alone(bank.model, index, False))
                if not bank.packs and any(alone(bank.model, index, padding=n) != expected for n in range(1, LONGER)):
                    fault = BaseFails("alone it writes other tokens behind padding")
                raise fault or Different(f"writes {written[index]} in the loop, {expected} alone")

    check(0)
    return {n: verdict_of(lambda i=i: check(i)) for i, n in enumerate(wanted) if n and n != NEIGHBOUR}


def _own_fault(model: Any, ids: Tensor, expected: Sequence[int], uncached: Sequence[int]) -> BaseFails | None:
    """Where the model's `generate` writes other tokens than its forward or, without a cache, than itself."""
    if list(expected) != list(uncached):
        return BaseFails("alone it writes other tokens with a cache than without")
    whole = torch.cat([ids, torch.tensor([expected])], 1).to(model.device)
    with torch.no_grad():
        best = model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    same = best.tolist() == list(expected)
    return None if same else BaseFails("`generate` writes other tokens than its forward says")
