"""What generate and chat share: a base with at most one adapter, and prompts inside the adapter's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.errors import UsageError

__all__ = ["Writer", "open_writer"]


Loading = tuple[str, str | None, str | None]
"""dtype, device and quantization of a base."""


@dataclass
class Writer:
    """Writes answers; `encoder` knows the template, `model` the rest."""

    bank: Any
    encoder: Any
    row: str | None

    def prompt(self, words: str) -> tuple[list[int], int]:
        """The tokens of a prompt inside the template, and the place of virtual tokens among them."""
        from inlay.data.table import Row
        from inlay.data.template import names_in

        template = self.encoder.template
        if template.kind == "messages":
            return self.encoder.asked([("user", words)])
        names = sorted(names_in(template.prompt), key=template.prompt.index)
        values: dict[str, Any] = {name: "" for name in names} | ({names[0]: words} if names else {})
        return self.encoder.prompt(Row(values, 0, "--prompt", 1))

    def write(self, ids: Sequence[int], place: int, settings: Mapping[str, Any], streamer: Any = None) -> list[int]:
        """The tokens that follow `ids`."""
        import torch

        model, tokenizer = self.bank.model, self.encoder.tokenizer
        given = torch.tensor([list(ids)], device=model.device)
        with self.bank.route([self.row], places=[place]):
            out = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), pad_token_id=tokenizer.pad_token_id,
                streamer=streamer, **settings,
            )  # fmt: skip
        return out[0].tolist() if model.config.is_encoder_decoder else out[0, len(ids) :].tolist()

    def words(self, ids: Sequence[int]) -> str:
        return self.encoder.tokenizer.decode(ids, skip_special_tokens=True)


def open_writer(base: str, adapter: str | None, how: Loading, raw: bool = False, chat: bool = False) -> Writer:
    """Open a base and an adapter; prompts go into the adapter's template, unless they are `raw` or a `chat`."""
    from inlay.bank.bank import attach
    from inlay.bases.load import load_base
    from inlay.data.encode import Encoder
    from inlay.data.template import Template
    from inlay.formats.carried import Carried, carried

    plain = Template("completion", "{prompt}", "completion", chat=chat)
    found = (carried([adapter]) if adapter is not None and not raw else None) or Carried(plain, 1 << 20)
    template = plain if raw or (chat and not found.template.chat) else found.template
    opened = load_base(base, *how)
    if not opened.model.can_generate():
        raise UsageError(
            f"{type(opened.model).__name__} does not write text", "Choose a causal or encoder-decoder base."
        )
    encoder = Encoder(opened.tokenizer, template, max(found.max_length, 1 << 16), found.place)
    bank = attach(opened.model)
    if adapter is not None:
        bank.load("adapter", adapter)
    return Writer(bank, encoder, "adapter" if adapter is not None else None)


def sampling(temperature: float, top_p: float, max_new_tokens: int, beams: int = 1) -> dict[str, Any]:
    """Settings of `generate`. Raises: UsageError."""
    if max_new_tokens < 1 or beams < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UsageError(
            "--max-new-tokens and --beams take 1 or more, --temperature 0 or more, --top-p a share above 0",
            "See --help.",
        )
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, "num_beams": beams, **drawn}
