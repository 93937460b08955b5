"""inlay generate"""

from __future__ import annotations

import string
from typing import Annotated, Any

import typer

from inlay.errors import UsageError

from .common import BaseName, Device, Dtype, Json, emit, guarded

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
    json: Json = False,
) -> None:
    """Write an answer to a prompt.

    inlay generate --base smollm2 --adapter runs/reviews/adapter --prompt "A film to forget."
    """
    with guarded():
        if prompt is None:
            raise UsageError("--prompt is missing", "Give --prompt.")
        import torch

        from inlay.bank.bank import attach
        from inlay.bases.load import load_base
        from inlay.formats.notes import read_notes

        stored = {} if adapter is None or raw else read_notes(adapter).get("template") or {}
        opened = load_base(base, dtype, device)
        bank, tokenizer = attach(opened.model), opened.tokenizer
        if tokenizer is None:
            raise UsageError(f"base {base!r} has no tokenizer", "Name a base folder that holds one.")
        if adapter is not None:
            bank.load("adapter", adapter)
        ids = _ids(tokenizer, prompt, stored, chat).to(opened.model.device)
        torch.manual_seed(seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        with bank.route(["adapter" if adapter else None]):
            model: Any = opened.model
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, num_beams=beams,
                pad_token_id=tokenizer.pad_token_id, **drawn,
            )  # fmt: skip
        new = out[0] if opened.model.config.is_encoder_decoder else out[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        if json:
            emit({"prompt": prompt, "text": text, "adapter": adapter, "new_tokens": len(new)}, True)
        else:
            typer.echo(text)


def _ids(tokenizer: Any, prompt: str, stored: dict[str, Any], chat: bool) -> Any:
    """(1, n) tokens of the prompt inside the template that it was trained with."""
    if chat or stored.get("chat"):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    names = [name for _, name, _, _ in string.Formatter().parse(stored.get("prompt", "")) if name]
    if len(names) == 1:
        prompt = stored["prompt"].format(**{names[0]: prompt})
    return tokenizer(prompt, return_tensors="pt")["input_ids"]
