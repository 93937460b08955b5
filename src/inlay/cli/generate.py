"""inlay generate"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from inlay.errors import UsageError
from inlay.values import Help

from . import flags
from .common import console, emit
from .writing import Sampling, open_writer


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """What is asked."""

    prompt: Annotated[str, Help("what to answer; the adapter's template goes around it")]
    adapter: Annotated[str | None, Help("an adapter's folder or its run's; without it, the plain base")] = None
    system: Annotated[str | None, Help("what the conversation opens with")] = None
    raw: Annotated[bool, Help("take the prompt as it is, without any template")] = False
    chat: Annotated[bool, Help("put the prompt into the model's own chat template")] = False


@flags.command(Generate, "writing an answer")
def command(given: Generate, as_json: bool) -> None:
    """Write an answer to a prompt.

    inlay generate --adapter runs/reviews --prompt "A film to forget."
    """
    if given.raw and (given.chat or given.system):
        raise UsageError("--raw takes the prompt as it is", "Leave --chat and --system out.")
    with console.status("writing"):
        writer = open_writer(given, given.adapter, given.raw, given.chat, given.system)
        new = writer.write(*writer.prompt(given.prompt), given)
    text = writer.words(new)
    if as_json:
        emit({"prompt": given.prompt, "text": text, "adapter": given.adapter, "new_tokens": len(new)}, True)
    else:
        typer.echo(text)
