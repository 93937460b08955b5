"""A classification head on a base: drawn at random where the files hold none, frozen as the rest, for adapters to copy.

An adapter trains a copy of its own (`inlay.methods.head`), so that the draw matters to nobody. It is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay.errors import UsageError

__all__ = [
    "HEADED",
    "WHOLE",
    "Head",
    "can_write",
    "drawn_alike",
    "fresh_modules",
    "head_class",
    "set_padding",
    "writes_text",
]

CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "regress": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}
"""transformers' class for each task."""
HEADED = ("ForSequenceClassification", "ForTokenClassification")
"""How the names of classes end that have a head."""
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
WHOLE = ("lm_head", "score", "classifier", "pre_classifier", "pooler.dense", "classifier.dense", "classifier.out_proj")
"""Heads, which are trained and so are never quantized."""
FRESH = ("missing_keys", "mismatched_keys")
"""What transformers' loading report calls weights that are drawn at random."""


@dataclass(frozen=True)
class Head:
    """What a base is opened for: the task classify, regress or tag, with the names of its `labels` in order."""

    task: str
    labels: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """For the base's config."""
        if self.task == "regress":
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}


def head_class(config: dict[str, Any], folder: Path | str, head: Head) -> Any:
    """transformers' class that opens the base with `head`. Raises: UsageError where it has none."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind, whole = config.get("model_type"), "TOKEN" if head.task == "tag" else "SEQUENCE"
    known = getattr(modeling_auto, f"MODEL_FOR_{whole}_CLASSIFICATION_MAPPING_NAMES")
    if kind not in known or config.get("is_encoder_decoder"):
        raise UsageError(f"{folder} ({kind}) takes no head for the task {head.task}", "Use --task generate, or BERT.")
    return getattr(transformers, CLASSES[head.task])


def set_padding(model: Any, tokenizer: Any) -> None:
    """Let a config that names no padding token name one: heads look for a row's last token by it."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0


def can_write(model: Any) -> bool:
    """Whether an open base writes text."""
    return bool(getattr(model, "can_generate", bool)())


def writes_text(config: dict[str, Any]) -> bool:
    """Whether the base that a config.json describes writes text, as encoders do not."""
    listed = config.get("architectures")
    named = [str(name) for name in listed] if isinstance(listed, list) else [str(listed or "")]
    return not any(named) or any(name.endswith(WRITERS) for name in named)


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Inside, random numbers are the same each time; outside, nothing is changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def fresh_modules(model: Any, report: dict[str, Any]) -> tuple[str, ...]:
    """The paths of head and pooler modules whose weights were drawn at random; they are taken out of the loading
    `report`, in which weights of other modules stay."""
    body = getattr(model, "base_model_prefix", "")
    found: dict[str, None] = {}
    for kind in FRESH:
        left = []
        for entry in report.get(kind) or ():
            key = str(entry[0] if isinstance(entry, tuple) else entry)
            if "pooler" in key.split(".") or not key.startswith(body + "."):
                found[key.rpartition(".")[0]] = None
            else:
                left.append(entry)
        report[kind] = left
    return tuple(sorted(found))
