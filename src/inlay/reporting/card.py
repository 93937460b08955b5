"""README.md of an adapter's folder: what it is, how it was made, how good it is, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from inlay.files import write_text
from inlay.methods.table import METHODS

from .facts import data_facts
from .markdown import code, fenced, plain
from .naming import Named, named
from .scores import final_rows, scores_of, verdict
from .usage import head_labels, here, shell, there
from .words import is_number, number, printable

__all__ = ["model_card", "write_card"]

HUB_METRICS = {"accuracy": "Accuracy", "f1": "Macro F1", "exact_match": "Exact match", "perplexity": "Perplexity"}
"""Metrics that hubs know, with the names they show."""
PIPELINES = {"label": "text-classification", "number": "text-classification", "tags": "token-classification"}
"""What hubs call the use of a model, by the kind of rows; the rest writes text."""
FORMATS = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "text"}
"""Kinds of files as `datasets` calls them; the rest is json."""


def write_card(folder: Path, record: Mapping[str, Any], command: str = "") -> None:
    """Write `folder`/README.md; `command` as in `model_card`."""
    try:
        task = json.loads((folder / "adapter_config.json").read_text(encoding="utf8")).get("task_type")
    except (OSError, ValueError, AttributeError):
        task = None
    write_text(folder / "README.md", model_card(record, task, command))


def model_card(record: Mapping[str, Any], task: str | None = None, command: str = "") -> str:
    """The card for a run's `record`; `task` is adapter_config.json's, `command` the shell command that repeats the run.
    The card holds no times, no dates and no paths of this machine, so that equal runs give equal cards. Every field of
    the record may be missing.
    """
    config = record.get("config") or {}
    base, method = named(str(config.get("base") or "base")), record.get("method") or config.get("method") or ""
    scores, count = scores_of(record), final_rows(record)
    files = ", ".join(code(_file_name(path)) for path in config.get("data") or []) or "rows that are not named"
    place = config.get("virtual_tokens_at") or "start"
    parameters = (record.get("cost") or {}).get("trainable_parameters")
    context = {
        "head": yaml.safe_dump(_head(record, base), sort_keys=False, allow_unicode=True, width=1000),
        "base": base,
        "method": method,
        "settings": ", ".join(f"{plain(k)}={plain(v)}" for k, v in (config.get("set") or {}).items()) or "its defaults",
        "files": files,
        "parameters": number(parameters) if is_number(parameters) else "?",
        "scores": scores,
        "count": "the" if count is None else number(count),
        "intervals": any(score.interval for score in scores),
        "verdict": verdict(record),
        "data": data_facts(record),
        "steps": _steps(record),
        "rate": _rate(record),
        "optimizer": config.get("optimizer", "adamw"),
        "seed": config.get("seed", 0),
        "dtype": record.get("dtype", "?"),
        "fingerprint": record.get("base_fingerprint", "?"),
        "notices": record.get("notices") or [],
        "command": command,
        "template": _template(record),
        "shell": shell(base, record),
        "here": here(base, record),
        "there": there(base, record, task),
        "place": place,
        "writes": head_labels(record) is None,
        "peft": record.get("peft_layout", True),
    }
    return printable(_environment().get_template("card.md.jinja").render(context))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("inlay.reporting", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"plain": plain, "code": code, "fenced": fenced}
    return environment


def _head(record: Mapping[str, Any], base: Named) -> dict[str, Any]:
    """What hubs read."""
    config, template = record.get("config") or {}, record.get("template") or {}
    peft = record.get("peft_layout", True)
    head: dict[str, Any] = {"base_model": printable(base.name), "library_name": "peft" if peft else "inlay"}
    if base.hub:
        head["base_model_relation"] = "adapter"
    head["pipeline_tag"] = PIPELINES.get(str(template.get("kind")), "text-generation")
    head |= {"license": base.license} if base.license else {}
    languages = (record.get("data") or {}).get("languages")
    head |= {"language": languages} if languages else {}
    head["tags"] = ["inlay", *(["peft"] if peft else []), str(config.get("method", "lora"))]
    metrics = [name for name in HUB_METRICS if is_number((record.get("heldout") or {}).get(name))]
    if metrics:
        head["metrics"] = metrics
        head["model-index"] = [_index(record, base, head["pipeline_tag"], metrics)]
    return head


def _index(record: Mapping[str, Any], base: Named, task: str, metrics: list[str]) -> dict[str, Any]:
    """Scores as hubs list them."""
    config, held = record.get("config") or {}, record["heldout"]
    files = [_file_name(path) for path in config.get("data") or []]
    ending = files[0].removesuffix(".gz").rpartition(".")[2].lower() if files else ""
    data = {"name": printable(", ".join(files) or "rows"), "type": FORMATS.get(ending, "json"), "split": "held out"}
    results = [{"type": name, "value": round(float(held[name]), 6), "name": HUB_METRICS[name]} for name in metrics]
    name = printable(f"{config.get('method', 'lora')} for {base.short}")
    return {"name": name, "results": [{"task": {"type": task}, "dataset": data, "metrics": results}]}


def _steps(record: Mapping[str, Any]) -> str:
    """The steps taken, and which state was kept."""
    rows = (record.get("config") or {}).get("batch_size", 16)
    best, kept = record.get("best_step"), record.get("heldout")
    steps = f"{number(record.get('steps', '?'))} steps of {number(rows)} rows"
    return f"{steps}; the best one, step {number(best)}, is kept" if best and kept else steps


def _rate(record: Mapping[str, Any]) -> str:
    """The run's learning rate, or the method's own."""
    config = record.get("config") or {}
    rate = config.get("lr") or getattr(METHODS.get(str(config.get("method"))), "lr", None)
    return number(rate) if is_number(rate) else "the method's own"


def _template(record: Mapping[str, Any]) -> dict[str, Any]:
    template = record.get("template") or {}
    if not template:
        return {}
    listed = (template.get("verbalizer") or {}).items()
    words = [(label, [each] if isinstance(each, str) else list(each)) for label, each in listed]
    kept = {name: template.get(name) or "" for name in ("kind", "prompt", "chat", "jinja")}
    if template.get("slot"):
        kept["prompt"] = f"{kept['prompt']}{{answer}}{template.get('after') or ''}"
    if template.get("kind") == "messages":
        kept["prompt"] = ""  # a column's name, which is no template
    return {**kept, "words": words}


def _file_name(path: Any) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2] or str(path)
