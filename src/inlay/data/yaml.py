"""YAML as people mean it: 1e-4 is a number, and "no", "on" and 12:30 are words."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["read_yaml"]

TAG = "tag:yaml.org,2002:"
RULES = {  # the core schema of YAML 1.2; PyYAML's own is that of 1.1
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


def read_yaml(text: str) -> Any:
    """The value that `text` holds. Raises: ValueError whose words say what is wrong, on one line."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise ValueError(f"line {node.start_mark.line + 1}: a key is there twice")
            return found

    for kind, (pattern, first) in RULES.items():
        marks = [mark if mark != "\0" else "" for mark in first]
        Loader.add_implicit_resolver(TAG + kind, re.compile(rf"^(?:{pattern})$"), marks)
    Loader.add_constructor(TAG + "int", lambda loader, node: int(node.value))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
