"""inlay generate"""

from __future__ import annotations

from typing import Annotated

import typer

from inlay.errors import UsageError

from .common import BaseName, Device, Dtype, Json, Quantize, emit, guarded
from .writing import open_writer, sampling

Option = typer.Option


def command(
    base: BaseName = "smollm2",
    prompt: Annotated[
        str | None, Option("--prompt", help="What to answer; the adapter's template goes around it.")
    ] = None,
    adapter: Annotated[str | None, Option("--adapter", help="An adapter's folder; without it, the plain base.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, Option(help="0 takes the likeliest token, more draws.")] = 0.0,
    top_p: Annotated[float, Option(help="Share of the probability to draw from.")] = 1.0,
    beams: Annotated[int, Option(help="Width of beam search.")] = 1,
    seed: Annotated[int, Option(help="For drawing.")] = 0,
    raw: Annotated[bool, Option("--raw", help="Take the prompt as it is, without any template.")] = False,
    chat: Annotated[bool, Option("--chat", help="Put the prompt into the model's own chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Write an answer to a prompt.

    inlay generate --base smollm2 --adapter runs/reviews/adapter --prompt "A film to forget."
    """
    with guarded():
        if prompt is None:
            raise UsageError("--prompt is missing", "Give --prompt.")
        settings = sampling(temperature, top_p, max_new_tokens, beams)
        writer = open_writer(base, adapter, (dtype, device, quantize), raw, chat)
        import torch

        torch.manual_seed(seed)
        new = writer.write(*writer.prompt(prompt), settings)
        text = writer.words(new)
        if json:
            emit({"prompt": prompt, "text": text, "adapter": adapter, "new_tokens": len(new)}, True)
        else:
            typer.echo(text)
