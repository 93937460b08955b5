"""A whole training run: base and data in, a folder with an adapter, its measures and its story out."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inlay
from inlay.bank.bank import Bank
from inlay.bases.load import Base, load_base
from inlay.data.encode import Encoder, Prepared
from inlay.data.table import Row, read_table, shuffled, split
from inlay.data.template import Columns, Template, choose_template, parse_verbalizer
from inlay.errors import UsageError
from inlay.evaluation.score import evaluate
from inlay.files import write_json
from inlay.methods.contract import Method
from inlay.methods.table import METHODS

from .contender import Contender, Plan
from .forward import check_trainable
from .loop import train

__all__ = ["Settings", "make_method", "peak_memory_mb", "run"]

HELDOUT_ROWS = 500
"""Rows at most that a share of the data is scored on; a held-out file is scored whole."""


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, by the names of the command's flags."""

    base: str
    data: Sequence[str]
    out: str
    method: str = "lora"
    set: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 512
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    limit: int | None = None
    heldout: str = "0.05"
    template: str | None = None
    verbalizer: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tokens_at_once: int = 4096


def run(settings: Settings, on_step: Callable[[Contender, int], None] | None = None) -> dict[str, Any]:
    """Train one adapter and return what `train --json` prints; the folder `settings.out` holds the rest.

    Raises: UsageError, DataError or FormatError before any training where the settings, the data or the base are wrong.
    """
    plan = _plan(settings, make_method(settings.method, settings.set))
    out = _folder(settings.out)
    rows, held, template = _rows(settings)
    base = load_base(settings.base, settings.dtype, settings.device)
    start = time.perf_counter()
    encoder = Encoder(base.tokenizer, template, settings.max_length)
    prepared = encoder.examples(rows)
    bank = inlay.attach(base.model)
    plan = dataclasses.replace(plan, method=plan.method.prepared(base.tokenizer))
    check_trainable(bank)
    plan.method.sites(bank.base)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "w", encoding="utf8") as metrics:

        def note(contenders: list[Contender]) -> None:
            contender = contenders[0]
            line = {"step": contender.step, "loss": contender.loss, "tokens": contender.tokens, "norm": contender.norm}
            line |= {"lr": contender.schedule.get_last_lr()[0], "seconds": time.perf_counter() - start}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if on_step is not None:
                on_step(contender, contender.total)

        contender = train(bank, [plan], prepared.examples, settings.tokens_at_once, note)[0]
    seconds = time.perf_counter() - start
    notes = {"template": template.to_dict(), "max_length": settings.max_length, "base": settings.base}
    bank.save("adapter", out / "adapter", notes=notes)
    scores = evaluate(bank, encoder, held, [None, "adapter"], settings.tokens_at_once) if held else {}
    result = _result(contender, prepared, seconds, scores, out, bank)
    write_json(out / "run.json", result | {"config": dataclasses.asdict(settings)} | _versions(base))
    return result


def make_method(name: str, values: Mapping[str, Any]) -> Method:
    """The method called `name` with some settings. Raises: UsageError naming methods or fields there are."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", f"Methods: {', '.join(METHODS)}.")
    fields = {f.name for f in dataclasses.fields(METHODS[name]) if f.init}
    for key in values:
        if key not in fields:
            raise UsageError(f"{name} has no setting {key!r}", f"Settings: {', '.join(sorted(fields))}.")
    try:
        return METHODS[name](**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be set to {dict(values)} ({error})", "Check the values.") from None


def peak_memory_mb() -> float:
    """The most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _folder(path: str) -> Path:
    out = Path(path)
    if (out / "run.json").exists():
        raise UsageError(f"{out} holds a finished run", "Choose another folder, or remove this one.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Name a folder.")
    return out


def _rows(settings: Settings) -> tuple[list[Row], list[Row], Template]:
    """Rows to train on, rows held out, and the template for both."""
    table = read_table(settings.data)
    unknown = sorted(set(settings.columns) - {f.name for f in dataclasses.fields(Columns)})
    if unknown:
        raise UsageError(f"columns names {unknown[0]!r}", "Known: text, label, prompt, completion, messages.")
    words = parse_verbalizer(settings.verbalizer) if settings.verbalizer else None
    template = choose_template(table, Columns(**settings.columns), settings.template, words)
    if template.kind == "label":
        for row in table.rows:
            template.label_of(row)
    rows = shuffled(table.rows, settings.seed)[: settings.limit]
    try:
        share = float(settings.heldout)
    except ValueError:
        return rows, list(read_table(settings.heldout).rows), template
    train_rows, held = split(rows, share)
    if not train_rows:
        raise UsageError(f"no row is left of {len(rows)} to train on", "Hold out fewer.")
    return train_rows, held[:HELDOUT_ROWS], template


def _plan(settings: Settings, method: Method) -> Plan:
    names = {f.name for f in dataclasses.fields(Plan)} & {f.name for f in dataclasses.fields(Settings)} - {"method"}
    return Plan(name="adapter", method=method, **{name: getattr(settings, name) for name in names})


def _result(
    contender: Contender, prepared: Prepared, seconds: float, scores: Mapping[Any, Mapping[str, float]], out: Path,
    bank: Bank,
) -> dict[str, Any]:  # fmt: skip
    result = {
        "method": type(contender.plan.method).title,
        "steps": contender.step,
        "tokens": contender.tokens,
        "seconds": seconds,
        "tokens_per_second": contender.tokens / seconds,
        "peak_memory_mb": peak_memory_mb(),
        "train_loss": contender.loss,
        "heldout": dict(scores.get("adapter", {})),
        "heldout_base": dict(scores.get(None, {})),
        "adapter": str(out / "adapter"),
        "trainable_parameters": len(bank.adapters["adapter"]),
        "rows": dict(prepared.counts),
        "status": contender.stopped,
    }
    if next(bank.model.parameters()).is_cuda:
        import torch

        result["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def _versions(base: Base) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"inlay": inlay.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"python": platform.python_version()}
    return {"versions": versions, "base_fingerprint": base.fingerprint, "dtype": str(base.dtype).removeprefix("torch.")}
