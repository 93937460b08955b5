"""The lines of code with which a reader of a card opens the adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from inlay.data.fields import parsed

from .naming import Named
from .words import printable

__all__ = ["head_labels", "here", "shell", "there"]

MARK = "…"


def shell(base: Named, record: Mapping[str, Any]) -> str:
    """Commands that use the adapter of the folder that they are typed in."""
    config, kind = record.get("config") or {}, (record.get("template") or {}).get("kind")
    given = ["--base", base.typed] + (["--quantize", str(config["quantize"])] if config.get("quantize") else [])
    about = f"{shlex.join(given)} --adapter ."
    lines = [f"inlay predict {about} --data rows.csv --out said.csv", f'inlay generate {about} --prompt "{MARK}"']
    if head_labels(record) is not None:
        return lines[0]
    return "\n".join(lines if kind == "label" else reversed(lines))


def head_labels(record: Mapping[str, Any]) -> list[str] | None:
    """The labels that a head of the adapter's own gives, one without a name where it gives a number; None where the
    model writes its answers."""
    template = record.get("template") or {}
    if template.get("task", "generate") == "generate":
        return None
    return list(template.get("verbalizer") or {"": []})


def _by_head(record: Mapping[str, Any], labels: list[str], model: str) -> list[str]:
    """The lines behind an opened adapter that gives labels, numbers or tags."""
    task = (record.get("template") or {}).get("task")
    if task == "regress":
        said = "print(float(logits))"
    elif task == "tag":
        said = "print([labels[n] for n in logits[0].argmax(-1).tolist()])  # one for each piece of a word"
    else:
        said = "print(labels[int(logits.argmax())])"
    return [
        *([f"labels = {json.dumps(labels, ensure_ascii=False)}"] if task != "regress" else []),
        f"logits = {model}(**inputs).logits",
        said,
    ]


def here(base: Named, record: Mapping[str, Any]) -> str:
    """Python that opens it with Inlay and has it answer."""
    quantize = (record.get("config") or {}).get("quantize")
    more, labels = f", quantize={_quoted(quantize)}" if quantize else "", head_labels(record)
    if labels is not None:
        task = (record.get("template") or {}).get("task")
        names = "" if task == "regress" else f", ({', '.join(map(_quoted, labels))},)"
        return "\n".join(
            [
                "import inlay",
                "from inlay.bases.heads import Head",
                "from inlay.bases.load import load_base",
                "",
                f"head = Head({_quoted(task)}{names})",
                f"base = load_base({_quoted(base.typed)}, head=head{more})",
                "bank = inlay.attach(base.model)",
                'bank.load("it", ".")',
                *_encoded(record, "base.tokenizer"),
                'bank.set("it")',
                *_by_head(record, labels, "base.model"),
            ]
        )
    lines = [
        "import inlay",
        "from inlay.bases.load import load_base",
        "",
        f"base = load_base({_quoted(base.typed)}{more})",
        "bank = inlay.attach(base.model)",
        'bank.load("it", ".")',
        *_encoded(record, "base.tokenizer"),
        'with bank.route(["it"]):',
        f"    out = base.model.generate(**inputs, max_new_tokens={_new_tokens(record)}, do_sample=False)",
        "print(base.tokenizer.decode(out[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def there(base: Named, record: Mapping[str, Any], task: str | None = None) -> str:
    """Python that opens it with HF PEFT and writes an answer; `task` is adapter_config.json's."""
    labels = head_labels(record)
    if labels is not None:
        whole = "AutoModelForTokenClassification" if task == "TOKEN_CLS" else "AutoModelForSequenceClassification"
        return "\n".join(
            [
                "from peft import PeftModel",
                f"from transformers import {whole}, AutoTokenizer",
                "",
                f"base = {_quoted(base.name)}" + ("" if base.hub else "  # its folder"),
                "tokenizer = AutoTokenizer.from_pretrained(base)",
                f"model = {whole}.from_pretrained(base, num_labels={len(labels)})",
                'model = PeftModel.from_pretrained(model, ".").eval()',
                *_encoded(record, "tokenizer"),
                *_by_head(record, labels, "model"),
            ]
        )
    kind = "AutoModelForSeq2SeqLM" if task == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"base = {_quoted(base.name)}" + ("" if base.hub else "  # its folder"),
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = {kind}.from_pretrained(base)",
        'model = PeftModel.from_pretrained(model, ".").eval()',
        *_encoded(record, "tokenizer"),
        f"out = model.generate(**inputs, max_new_tokens={_new_tokens(record)}, do_sample=False)",
        "print(tokenizer.decode(out[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def asked(record: Mapping[str, Any]) -> str:
    """The template's prompt, with a mark for each field of a row."""
    template = record.get("template") or {}
    prompt = "" if template.get("kind") == "messages" else str(template.get("prompt") or "")
    try:
        return "".join(words + (MARK if name is not None else "") for words, name in parsed(prompt)) or MARK
    except ValueError:  # of an earlier release, whose templates had other rules
        return prompt


def _encoded(record: Mapping[str, Any], tokenizer: str) -> list[str]:
    """The prompt, and the tokens it makes as training made them."""
    template = record.get("template") or {}
    lines = [f"prompt = {_quoted(asked(record))}"]
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


def _new_tokens(record: Mapping[str, Any]) -> int:
    return 5 if (record.get("template") or {}).get("kind") == "label" else 64


def _quoted(text: Any) -> str:
    """Text as a Python literal."""
    return json.dumps(printable(str(text)), ensure_ascii=False)
