"""One answer out of those of all replicas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["merged_adapters", "merged_metrics"]


def merged_adapters(answers: Mapping[str, bytes]) -> dict[str, Any]:
    """Bodies of /v1/adapters by replica as one: an adapter is loaded where any replica has it; `replicas` have it."""
    bodies = {replica: json.loads(body) for replica, body in sorted(answers.items())}
    made = dict(next(iter(bodies.values())))
    found: dict[str, dict[str, Any]] = {}
    for replica, body in bodies.items():
        for one in body["data"]:
            known = found.setdefault(one["name"], {**one, "replicas": []})
            used = [last for last in (known["last_used"], one["last_used"]) if last is not None]
            known |= {
                "loaded": known["loaded"] or one["loaded"], "last_used": max(used, default=None),
                "version": max(known["version"], one["version"]), "error": known["error"] or one["error"],
                "replicas": [*known["replicas"], *([replica] if one["loaded"] else [])],
            }  # fmt: skip
    return made | {"data": sorted(found.values(), key=lambda one: one["name"])}


def merged_metrics(pages: Mapping[str, bytes]) -> bytes:
    """Prometheus' texts by replica as one, with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]
    registry: Any = _Families(list(families.values()))
    return generate_latest(registry)


class _Families:
    def __init__(self, families: Sequence[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        yield from self.families
