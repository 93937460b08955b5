"""inlay chat"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Gt, Le

from inlay.errors import DataError, UsageError
from inlay.values import Count, Help, NonNegative

from . import flags
from .common import console
from .writing import Sampling, Writer, open_writer

COMMANDS = "/base, /adapter, /reset, /quit"


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
    if as_json:
        raise UsageError("a conversation is no JSON object", "Leave --json out; generate --json answers one prompt.")
    with console.status("loading"):
        writer = open_writer(given, given.adapter)
    conversation = _Conversation(writer, given, given.system)
    console.print(COMMANDS, style="dim")
    while (line := _line()) is not None and line not in ("/quit", "/exit"):
        conversation.take(line)


def _line() -> str | None:
    """What was typed; None at the end of the input."""
    if sys.stdin.isatty():
        console.print("› ", end="", style="bold")
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise DataError(
            "what was typed is not UTF-8", "Set the terminal, or the file that is piped in, to it."
        ) from None
    return line.strip() if line else None


class _Conversation:
    """The turns so far. Adapters trained on single prompts see each line alone, as they were trained to."""

    def __init__(self, writer: Writer, settings: Sampling, system: str | None) -> None:
        self.writer, self.settings = writer, settings
        self.count = 0  # answers so far: each is drawn by a seed of its own
        self.opening = [("system", system)] if system else []
        self.turns = list(self.opening)
        trained = writer.row is not None
        template, tokenizer = writer.encoder.template, writer.encoder.tokenizer
        why = "this adapter was trained on single prompts" if trained else "this base has no chat template"
        self.remembers = template.kind == "messages" if trained else bool(tokenizer.chat_template)
        if not self.remembers and system:
            raise UsageError(f"{why}, so that a system message has no place", "Leave it out.")
        if not self.remembers:
            console.print(f"{why}: each line stands alone", style="dim")

    def take(self, line: str) -> None:
        if line == "/reset":
            self.turns = list(self.opening)
        elif line in ("/base", "/adapter"):
            there = bool(self.writer.bank.adapters)
            self.writer.row = "adapter" if line == "/adapter" and there else None
            said = "the adapter answers" if self.writer.row else "the plain base answers"
            console.print(f"{'there is no adapter: ' if line == '/adapter' and not there else ''}{said}", style="dim")
        elif re.fullmatch(r"/\w+", line):
            console.print(f"{line} is none of {COMMANDS}", style="dim", markup=False, highlight=False)
        elif line:
            self.answer(line)

    def answer(self, line: str) -> None:
        self.turns.append(("user", line))
        ids, place = self.writer.encoder.asked(self.turns) if self.remembers else self.writer.prompt(line)
        settings = replace(self.writer.fitting(self.settings, len(ids)), seed=self.settings.seed + self.count)
        self.count += 1
        try:
            new = self.writer.write(ids, place, settings, said)
        except UsageError as error:  # the conversation has outgrown the base
            self.turns.pop()
            more = " /reset begins afresh." if self.remembers else ""
            console.print(f"{error}{more}", style="red", markup=False, highlight=False, soft_wrap=True)
            return
        said("\n")
        self.turns.append(("assistant", self.writer.words(new)))


def said(text: str) -> None:
    """Show the next words of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
