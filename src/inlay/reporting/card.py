"""README.md of an adapter's folder: what it is, how it was made, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from inlay.files import write_text

__all__ = ["model_card", "write_card"]


def write_card(folder: Path, story: Mapping[str, Any]) -> None:
    """Write `folder`/README.md."""
    write_text(folder / "README.md", model_card(story))


def model_card(story: Mapping[str, Any]) -> str:
    """The card for a run's `story`. It holds no times and dates, so that the same run gives the same card."""
    config, held, base = story["config"], story.get("heldout", {}), story.get("heldout_base", {})
    head = {
        "base_model": config["base"],
        "library_name": "peft" if story.get("peft_layout", True) else "inlay",
        "tags": ["inlay", "peft", config.get("method", "lora")],
        "pipeline_tag": "text-generation",
    }
    environment = Environment(
        loader=PackageLoader("inlay.reporting", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    scores = [(name, _score(base.get(name)), _score(value)) for name, value in held.items()]
    told = {"head": yaml.safe_dump(head, sort_keys=False, allow_unicode=True), "story": story, "scores": scores}
    named = {name: _name(value) for name, value in (("base", config["base"]), ("method", story.get("method", "")))}
    settings = ", ".join(f"{k}={v}" for k, v in config.get("set", {}).items()) or "its defaults"
    data = ", ".join(_name(Path(str(path)).name) for path in config.get("data", []))
    parameters = story.get("cost", {}).get("trainable_parameters")
    named |= {
        "quantize": config.get("quantize") or "",
        "settings": settings,
        "files": data,
        "parameters": "?" if parameters is None else f"{parameters:,}",
    }
    return environment.get_template("card.md.jinja").render(**told, **named)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _name(value: Any) -> str:
    """On one line, and no markup."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
