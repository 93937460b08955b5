"""Which types, methods and laws a call of the sweep asks for."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

from .run import Job
from .uses import USES, types_of

__all__ = ["LAW_NAMES", "TWELVE", "chosen_jobs"]

LAW_NAMES = (
    "attach", "mixed", "nan", "media", "packed", "to peft", "from peft", "reload", "merge", "generate", "decode",
    "recompute", "dtypes",
)  # fmt: skip
TWELVE = (
    "causal:llama", "causal:gpt2", "causal:gemma3_text", "causal:qwen3_moe", "causal:mamba", "causal:bloom",
    "masked:bert", "masked:deberta-v2", "seq2seq:t5", "seq2seq:bart", "image:vit", "vision-text:llava",
)  # fmt: skip
"""A type for each trait that matters to methods."""
CLASSIFY_LAWS = ("mixed", "to peft", "merge")
"""What a head of labels can break; the rest was tried on the same backbone in its first use."""


def chosen_jobs(options: Any) -> list[Job]:
    """One job a type, in an order that mixes uses. Exits with a sentence where a name is unknown."""
    everything = [(use.name, name) for use in USES.values() for name in sorted(types_of(use))]
    wanted = _words(options.types) or (list(TWELVE) if options.table else [])
    uses = _words(options.use)
    _check(uses, USES, "uses")
    known = {name for _, name in everything} | {f"{use}:{name}" for use, name in everything}
    _check(wanted, known, "types")
    found = [
        (use, name)
        for use, name in everything
        if (not uses or use in uses) and (not wanted or name in wanted or f"{use}:{name}" in wanted)
    ]
    found.sort(key=lambda job: hashlib.sha256(":".join(job).encode()).digest())  # what is there says much, soon
    if options.part:
        number, total = _part(options.part)
        found = found[number::total]
    methods, laws = _methods(options), tuple(_words(options.laws)) or LAW_NAMES
    _check(laws, LAW_NAMES, "laws")
    others = {name for use, name in everything if use in ("causal", "masked", "seq2seq")}

    def laws_of(use: str, name: str) -> tuple[str, ...]:
        return tuple(law for law in laws if options.laws or not _spared(use, name, others, law))

    return [Job(use, name, methods, laws_of(use, name), options.device) for use, name in found]


def _spared(use: str, name: str, others: set[str], law: str) -> bool:
    return use == "classify" and name in others and law not in CLASSIFY_LAWS


def _methods(options: Any) -> tuple[str, ...]:
    from .samples import SAMPLES, TABLE

    names = tuple(_words(options.methods)) or tuple(TABLE if options.table else SAMPLES)
    _check(names, TABLE, "methods")
    return names


def _part(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if number == "HEAD":
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        number = str(int(hashlib.sha256(commit.strip().encode()).hexdigest(), 16) % int(total or 0) + 1)
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        sys.exit(f"{text!r} is no part. Write K/N with 1 <= K <= N, or HEAD/N.")
    return int(number) - 1, int(total)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _check(words: Any, known: Any, what: str) -> None:
    if unknown := [word for word in words if word not in known]:
        listed = f" Known: {', '.join(known)}." if len(known) < 40 else ""
        sys.exit(f"unknown {what}: {', '.join(unknown)}.{listed}")
