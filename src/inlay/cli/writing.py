"""What generate, chat and predict share: a base with at most one adapter, and prompts in the adapter's own template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from inlay.errors import UsageError
from inlay.runs.settings import Base, Device, Dtype, Quantize
from inlay.values import Checked, Count, Help, NonNegative, Seed

from .opening import open_bank

if TYPE_CHECKING:
    from inlay.data.prompting import Prompting

__all__ = ["Sampling", "Writer", "open_writer"]


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How tokens are drawn, and from which base."""

    base: Base = "smollm2"
    max_new_tokens: Annotated[Count, Help("tokens to write at most")] = 64
    temperature: Annotated[NonNegative, Le(100), Help("0 takes the likeliest token, more draws")] = 0.0
    top_p: Annotated[float, Gt(0), Le(1), Help("share of the probability to draw from")] = 1.0
    beams: Annotated[int, Ge(1), Le(256), Help("width of beam search")] = 1
    seed: Annotated[Seed, Help("for drawing")] = 0
    dtype: Dtype = "auto"
    device: Device = None
    quantize: Quantize = None

    def of_row(self, number: int) -> Any:
        """What the row `number` is drawn by; each has a seed of its own."""
        from inlay.runtime.sampling import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed + number
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """Those of transformers' `generate`."""
        drawn: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams, **drawn}


@dataclass
class Writer:
    """Writes answers; `encoder` knows the template, the bank's model the rest. `system` opens each conversation."""

    bank: Any
    encoder: Any
    row: str | None
    system: str | None = None
    positions: int | None = None

    def prompt(self, words: str) -> tuple[list[int], int]:
        """The tokens of a prompt inside the template, and the place of virtual tokens among them."""
        from inlay.data.prompting import prompt_row

        template = self.encoder.template
        opening = [("system", self.system)] if self.system else []
        if template.kind == "messages":
            return self.encoder.asked([*opening, ("user", words)])
        row = prompt_row(template, words)
        if opening:
            return self.encoder.asked([*opening, ("user", template.prompt_of(row))])
        return self.encoder.prompt(row)

    def write(
        self, ids: Sequence[int], place: int, settings: Sampling, on_text: Callable[[str], object] | None = None
    ) -> list[int]:
        """The tokens that follow `ids`; `on_text` gets their text as it comes. Raises: UsageError where the base has no
        positions for them."""
        return self.write_many([(ids, place)], settings, on_text)[0]

    def write_many(
        self, prompts: Sequence[tuple[Sequence[int], int]], settings: Sampling,
        on_text: Callable[[str], object] | None = None, most: int = 32,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens that follow each of several prompts, `most` at once; each is drawn by its place among them."""
        from inlay.runtime.generating import generate
        from inlay.runtime.requests import Request

        if any(not ids for ids, _ in prompts):
            raise UsageError("the prompt has no tokens", "Give some words.")
        self._check_positions(prompts, settings)
        if settings.beams > 1:
            groups = [prompts[start : start + most] for start in range(0, len(prompts), most)]
            return [ids for group in groups for ids in self._by_beams(group, settings)]
        requests = [
            Request(self.row, ids, settings.of_row(number), place) for number, (ids, place) in enumerate(prompts)
        ]  # fmt: skip
        found: list[list[int]] = [[] for _ in prompts]
        for token in generate(self.bank, requests, self.encoder.tokenizer if on_text else None, most=most):
            if token.error is not None:
                raise token.error
            found[token.request].append(token.id)
            if on_text and token.text:
                on_text(token.text)
        return found

    def _by_beams(self, prompts: Sequence[tuple[Sequence[int], int]], settings: Sampling) -> list[list[int]]:
        """By transformers' beam search, in padded rows."""
        import torch

        model, tokenizer = self.bank.model, self.encoder.tokenizer
        longest, pad = max(len(ids) for ids, _ in prompts), tokenizer.pad_token_id or 0
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids, _ in prompts]
        given = torch.tensor(rows, device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in prompts], device=model.device)
        with torch.no_grad(), self.bank.route([self.row] * len(rows), places=[place for _, place in prompts]):
            out = model.generate(input_ids=given, attention_mask=mask, pad_token_id=pad, **settings.arguments())
        start = 0 if model.config.is_encoder_decoder else longest
        return [_ended(row[start:].tolist(), tokenizer.pad_token_id, tokenizer.eos_token_id) for row in out]

    def fitting(self, settings: Sampling, prompt: int) -> Sampling:
        """The settings with as many new tokens as the base has positions for behind a prompt, one at least."""
        if self.positions is None or self.bank.model.config.is_encoder_decoder:
            return settings
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, max(1, self.positions - prompt)))

    def _check_positions(self, prompts: Sequence[tuple[Sequence[int], int]], settings: Sampling) -> None:
        longest = max(len(ids) for ids, _ in prompts)
        read = 0 if self.bank.model.config.is_encoder_decoder else longest
        if self.positions is not None and read + settings.max_new_tokens > self.positions:
            raise UsageError(
                f"the base has {self.positions} positions for a row; the prompt takes {longest} and "
                f"--max-new-tokens {settings.max_new_tokens}",
                "Give a shorter prompt, or write fewer tokens.",
            )

    def words(self, ids: Sequence[int]) -> str:
        return self.encoder.tokenizer.decode(ids, skip_special_tokens=True)


def _ended(ids: list[int], pad: int | None, end: int | None) -> list[int]:
    """The tokens without the padding behind the end."""
    while len(ids) > 1 and ids[-1] == pad and (pad != end or ids[-2] == pad):
        ids.pop()
    return ids


def open_writer(
    given: Sampling, adapter: str | None, raw: bool = False, chat: bool = False, system: str | None = None
) -> Writer:
    """Open a base and an adapter; prompts go into the adapter's template, unless they are `raw` or a `chat`.

    Raises: UsageError where the base writes no text, or a system message has no place in the template.
    """
    from inlay.bases.adapters import adapter_folder

    folders = {} if adapter is None else {"adapter": adapter_folder(adapter)}
    if folders:
        _check_writes(adapter, folders["adapter"])
    found = _reading([*folders.values()], raw, chat or (system is not None and not folders))
    if system is not None and not found.template.chat:
        raise UsageError(
            f"--system has no place in the template {found.template.prompt!r}, which the adapter was trained with",
            "Leave it out.",
        )
    if found.template.chat and not folders:
        from inlay.bases.load import load_tokenizer

        if getattr(load_tokenizer(given.base), "chat_template", "") is None:
            raise UsageError("the base's tokenizer has no chat template", "Leave --chat and --system out.")
    opened = open_bank(given, folders, found)
    return Writer(opened.bank, opened.encoder, "adapter" if folders else None, system, opened.positions)


def _check_writes(name: str | None, folder: Path) -> None:
    """Raises: UsageError where an adapter was trained for a head."""
    from inlay.data.prompting import prompting_of

    found = prompting_of([folder])
    if found is not None and found.template.task != "generate":
        raise UsageError(
            f"{name} was trained to {found.template.task} with a head, and writes no text", "Use `inlay predict`."
        )


def _reading(folders: Sequence[Path], raw: bool, chat: bool) -> Prompting:
    """The adapter's own way of prompting; for the plain base, or where it is asked for, words alone or a chat."""
    from inlay.data.prompting import Prompting, prompting_of
    from inlay.data.template import Template

    found = prompting_of(folders) if folders and not raw else None
    plain = Template("completion", "{prompt}", "completion")
    if chat:
        plain = Template("messages", answer="messages", chat=True)
    if found is None or (chat and not found.template.chat):
        if found is not None:
            raise UsageError("the adapter was trained on plain prompts, not on a chat", "Leave --chat out.")
        return Prompting(plain, 1 << 20)
    return Prompting(found.template, max(found.max_length, 1 << 16), found.virtual_at)
