"""inlay chat"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Gt, Le

from inlay.errors import UsageError
from inlay.values import Count, Help, NonNegative

from . import flags
from .common import console
from .writing import Sampling, Writer, open_writer


@dataclass(frozen=True, kw_only=True)
class Chat(Sampling):
    """Who is talked with."""

    adapter: Annotated[str | None, Help("an adapter's folder or its run's; without it, the plain base")] = None
    system: Annotated[str | None, Help("what the conversation opens with")] = None
    max_new_tokens: Annotated[Count, Help("tokens to write at most, each time")] = 256
    temperature: Annotated[NonNegative, Le(100), Help("0 takes the likeliest token, more draws")] = 0.7
    top_p: Annotated[float, Gt(0), Le(1), Help("share of the probability to draw from")] = 0.95


@flags.command(Chat, "talking")
def command(given: Chat, as_json: bool) -> None:
    """Talk with a base or an adapter; it keeps the conversation, in the template it was trained with.

    /base and /adapter switch between the two, /reset forgets, /quit (or Ctrl-D) ends.

        inlay chat --adapter runs/assistant
    """
    with console.status("loading"):
        import torch

        writer = open_writer(given, given.adapter)
    torch.manual_seed(given.seed)
    conversation = _Conversation(writer, given, given.system)
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

    def __init__(self, writer: Writer, settings: Sampling, system: str | None) -> None:
        self.writer, self.settings = writer, settings
        self.opening = [("system", system)] if system else []
        self.turns = list(self.opening)
        template = writer.encoder.template
        self.remembers = template.kind == "messages" or writer.row is None
        if not self.remembers and system:
            raise UsageError("this adapter was trained on single prompts, without a system message", "Leave it out.")
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
        try:
            new = self.writer.write(ids, place, self.settings, streamer)
        except UsageError as error:  # the conversation has outgrown the base
            self.turns.pop()
            console.print(f"{error} /reset begins afresh.", style="red", markup=False, highlight=False)
            return
        self.turns.append(("assistant", self.writer.words(new)))
