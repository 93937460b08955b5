"""inlay chat"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .common import BaseName, Device, Dtype, Quantize, console, guarded
from .writing import Writer, open_writer, sampling

Option = typer.Option


def command(
    base: BaseName = "smollm2",
    adapter: Annotated[str | None, Option("--adapter", help="An adapter's folder; without it, the plain base.")] = None,
    system: Annotated[str | None, Option(help="What the conversation opens with.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most, each time.")] = 256,
    temperature: Annotated[float, Option(help="0 takes the likeliest token, more draws.")] = 0.7,
    top_p: Annotated[float, Option(help="Share of the probability to draw from.")] = 0.95,
    seed: Annotated[int, Option(help="For drawing.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    quantize: Quantize = None,
) -> None:
    """Talk with a base or an adapter; it keeps the conversation, in the template it was trained with.

    /base and /adapter switch between the two, /reset forgets, /quit (or Ctrl-D) ends.

        inlay chat --base smollm2 --adapter runs/assistant/adapter
    """
    with guarded():
        settings = sampling(temperature, top_p, max_new_tokens)
        with console.status("loading"):
            writer = open_writer(base, adapter, (dtype, device, quantize))
        import torch

        torch.manual_seed(seed)
        conversation = _Conversation(writer, settings, system)
        console.print("/base, /adapter, /reset, /quit", style="dim")
        while (line := _line()) is not None and line != "/quit":
            conversation.take(line)


def _line() -> str | None:
    """What was typed; None at the end of the input."""
    if sys.stdin.isatty():
        console.print("› ", end="", style="bold")
    line = sys.stdin.readline()
    return line.strip() if line else None


class _Conversation:
    """The turns so far. Adapters trained on single prompts see each line alone, as they were trained to."""

    def __init__(self, writer: Writer, settings: dict[str, Any], system: str | None) -> None:
        self.writer, self.settings = writer, settings
        self.opening = [("system", system)] if system else []
        self.turns = list(self.opening)
        template = writer.encoder.template
        self.remembers = template.kind == "messages" or writer.row is None
        if not self.remembers:
            console.print("this adapter was trained on single prompts: each line stands alone", style="dim")

    def take(self, line: str) -> None:
        if line == "/reset":
            self.turns = list(self.opening)
        elif line in ("/base", "/adapter"):
            there = bool(self.writer.bank.adapters)
            self.writer.row = "adapter" if line == "/adapter" and there else None
            console.print("the adapter answers" if self.writer.row else "the plain base answers", style="dim")
        elif line:
            self.answer(line)

    def answer(self, line: str) -> None:
        from transformers import TextStreamer

        tokenizer: Any = self.writer.encoder.tokenizer
        self.turns.append(("user", line))
        asks = self.remembers and tokenizer.chat_template
        ids, place = self.writer.encoder.asked(self.turns) if asks else self.writer.prompt(line)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        new = self.writer.write(ids, place, self.settings, streamer)
        self.turns.append(("assistant", self.writer.words(new)))
