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

from .command import command_of
from .facts import data_facts
from .markdown import code, fenced, plain
from .naming import Named, named
from .scores import final_rows, scores_of, verdict
from .usage import here, shell, there
from .words import is_number, number, printable

__all__ = ["model_card", "write_card"]

HUB_METRICS = {"accuracy": "Accuracy", "f1": "Macro F1", "exact_match": "Exact match", "perplexity": "Perplexity"}
"""Metrics that hubs know, with the names they show."""
FORMATS = {"csv": "csv", "tsv": "csv", "parquet": "parquet", "txt": "text"}
"""Kinds of files as `datasets` calls them; the rest is json."""


def write_card(folder: Path, story: Mapping[str, Any]) -> None:
    """Write `folder`/README.md."""
    try:
        task = json.loads((folder / "adapter_config.json").read_text(encoding="utf8")).get("task_type")
    except (OSError, ValueError, AttributeError):
        task = None
    write_text(folder / "README.md", model_card(story, task))


def model_card(story: Mapping[str, Any], task: str | None = None) -> str:
    """The card for a run's `story`; `task` is adapter_config.json's. It holds no times and dates and no paths of this
    machine, so that the same run gives the same card. Every field of the story may be missing.
    """
    config = story.get("config") or {}
    base, method = named(str(config.get("base") or "base")), story.get("method") or config.get("method") or ""
    scores, count = scores_of(story), final_rows(story)
    files = ", ".join(code(_file_name(path)) for path in config.get("data") or []) or "rows that are not named"
    place = config.get("virtual_tokens_at") or "start"
    parameters = (story.get("cost") or {}).get("trainable_parameters")
    told = {
        "head": yaml.safe_dump(_head(story, base), sort_keys=False, allow_unicode=True, width=1000),
        "base": base,
        "method": method,
        "settings": ", ".join(f"{plain(k)}={plain(v)}" for k, v in (config.get("set") or {}).items()) or "its defaults",
        "files": files,
        "parameters": number(parameters) if is_number(parameters) else "?",
        "scores": scores,
        "count": "the" if count is None else number(count),
        "intervals": any(score.interval for score in scores),
        "verdict": verdict(story),
        "data": data_facts(story),
        "steps": _steps(story),
        "rate": _rate(story),
        "optimizer": config.get("optimizer", "adamw"),
        "seed": config.get("seed", 0),
        "dtype": story.get("dtype", "?"),
        "fingerprint": story.get("base_fingerprint", "?"),
        "notices": story.get("notices") or [],
        "command": command_of(story, portable=True),
        "template": _template(story),
        "shell": shell(base, story),
        "here": here(base, story),
        "there": there(base, story, task),
        "place": place,
        "peft": story.get("peft_layout", True),
    }
    return printable(_environment().get_template("card.md.jinja").render(told))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("inlay.reporting", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"plain": plain, "code": code, "fenced": fenced}
    return environment


def _head(story: Mapping[str, Any], base: Named) -> dict[str, Any]:
    """What hubs read."""
    config, template = story.get("config") or {}, story.get("template") or {}
    peft = story.get("peft_layout", True)
    head: dict[str, Any] = {"base_model": printable(base.name), "library_name": "peft" if peft else "inlay"}
    if base.hub:
        head["base_model_relation"] = "adapter"
    head["pipeline_tag"] = "text-classification" if template.get("kind") == "label" else "text-generation"
    head |= {"license": base.license} if base.license else {}
    languages = (story.get("data") or {}).get("languages")
    head |= {"language": languages} if languages else {}
    head["tags"] = ["inlay", *(["peft"] if peft else []), str(config.get("method", "lora"))]
    metrics = [name for name in HUB_METRICS if is_number((story.get("heldout") or {}).get(name))]
    if metrics:
        head["metrics"] = metrics
        head["model-index"] = [_index(story, base, head["pipeline_tag"], metrics)]
    return head


def _index(story: Mapping[str, Any], base: Named, task: str, metrics: list[str]) -> dict[str, Any]:
    """Scores as hubs list them."""
    config, held = story.get("config") or {}, story["heldout"]
    files = [_file_name(path) for path in config.get("data") or []]
    ending = files[0].removesuffix(".gz").rpartition(".")[2].lower() if files else ""
    data = {"name": printable(", ".join(files) or "rows"), "type": FORMATS.get(ending, "json"), "split": "held out"}
    told = [{"type": name, "value": round(float(held[name]), 6), "name": HUB_METRICS[name]} for name in metrics]
    name = printable(f"{config.get('method', 'lora')} for {base.short}")
    return {"name": name, "results": [{"task": {"type": task}, "dataset": data, "metrics": told}]}


def _steps(story: Mapping[str, Any]) -> str:
    """The steps taken, and which state was kept."""
    rows = (story.get("config") or {}).get("batch_size", 16)
    best, kept = story.get("best_step"), story.get("heldout")
    told = f"{number(story.get('steps', '?'))} steps of {number(rows)} rows"
    return f"{told}; the best one, step {number(best)}, is kept" if best and kept else told


def _rate(story: Mapping[str, Any]) -> str:
    """The run's learning rate, or the method's own."""
    config = story.get("config") or {}
    rate = config.get("lr") or getattr(METHODS.get(str(config.get("method"))), "lr", None)
    return number(rate) if is_number(rate) else "the method's own"


def _template(story: Mapping[str, Any]) -> dict[str, Any]:
    told = story.get("template") or {}
    if not told:
        return {}
    listed = (told.get("verbalizer") or {}).items()
    words = [(label, [each] if isinstance(each, str) else list(each)) for label, each in listed]
    kept = {name: told.get(name) or "" for name in ("kind", "prompt", "chat", "jinja")}
    if told.get("slot"):
        kept["prompt"] = f"{kept['prompt']}{{answer}}{told.get('after') or ''}"
    if told.get("kind") == "messages":
        kept["prompt"] = ""  # a column's name, which is no template
    return {**kept, "words": words}


def _file_name(path: Any) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2] or str(path)
