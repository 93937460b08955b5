"""The lines of code with which a reader of a card opens the adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from inlay.data.fields import parsed

from .naming import Named
from .words import printable

__all__ = ["here", "shell", "there"]

MARK = "…"


def shell(base: Named, story: Mapping[str, Any]) -> str:
    """Commands that use the adapter of the folder that they are typed in."""
    config, kind = story.get("config") or {}, (story.get("template") or {}).get("kind")
    given = ["--base", base.typed] + (["--quantize", str(config["quantize"])] if config.get("quantize") else [])
    about = f"{shlex.join(given)} --adapter ."
    lines = [f"inlay predict {about} --data rows.csv --out said.csv", f'inlay generate {about} --prompt "{MARK}"']
    return "\n".join(lines if kind == "label" else reversed(lines))


def here(base: Named, story: Mapping[str, Any]) -> str:
    """Python that opens it with Inlay and writes an answer."""
    quantize = (story.get("config") or {}).get("quantize")
    more = f", quantize={_quoted(quantize)}" if quantize else ""
    lines = [
        "import inlay",
        "from inlay.bases.load import load_base",
        "",
        f"base = load_base({_quoted(base.typed)}{more})",
        "bank = inlay.attach(base.model)",
        'bank.load("it", ".")',
        *_encoded(story, "base.tokenizer"),
        'with bank.route(["it"]):',
        f"    out = base.model.generate(**inputs, max_new_tokens={_new_tokens(story)}, do_sample=False)",
        "print(base.tokenizer.decode(out[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def there(base: Named, story: Mapping[str, Any], task: str | None = None) -> str:
    """Python that opens it with HF PEFT and writes an answer; `task` is adapter_config.json's."""
    kind = "AutoModelForSeq2SeqLM" if task == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"base = {_quoted(base.name)}" + ("" if base.hub else "  # its folder"),
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = {kind}.from_pretrained(base)",
        'model = PeftModel.from_pretrained(model, ".").eval()',
        *_encoded(story, "tokenizer"),
        f"out = model.generate(**inputs, max_new_tokens={_new_tokens(story)}, do_sample=False)",
        "print(tokenizer.decode(out[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def asked(story: Mapping[str, Any]) -> str:
    """The template's prompt, with a mark for each field of a row."""
    template = story.get("template") or {}
    prompt = "" if template.get("kind") == "messages" else str(template.get("prompt") or "")
    try:
        return "".join(words + (MARK if name is not None else "") for words, name in parsed(prompt)) or MARK
    except ValueError:  # of an earlier release, whose templates had other rules
        return prompt


def _encoded(story: Mapping[str, Any], tokenizer: str) -> list[str]:
    """The prompt, and the tokens it makes as training made them."""
    template = story.get("template") or {}
    lines = [f"prompt = {_quoted(asked(story))}"]
    if not (template.get("chat") or template.get("kind") == "messages"):
        return [*lines, f'inputs = {tokenizer}(prompt, return_tensors="pt")']
    if template.get("jinja"):
        lines = [
            "import json",
            "",
            *lines,
            'chat = json.load(open("inlay.json", encoding="utf8"))["template"]["jinja"]',
        ]
    return [
        *lines,
        'turns = [{"role": "user", "content": prompt}]',
        f"inputs = {tokenizer}.apply_chat_template(",
        '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True'
        + (", chat_template=chat" if template.get("jinja") else ""),
        ")",
    ]


def _new_tokens(story: Mapping[str, Any]) -> int:
    return 5 if (story.get("template") or {}).get("kind") == "label" else 64


def _quoted(text: Any) -> str:
    """Text as a Python literal."""
    return json.dumps(printable(str(text)), ensure_ascii=False)
