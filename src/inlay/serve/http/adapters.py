"""/v1/models and /v1/adapters, loading and unloading in vLLM's form, and /v1/classify."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import Request
from starlette.responses import PlainTextResponse

from inlay.evaluation.predict import Prediction
from inlay.serve.entries import AdapterInfo
from inlay.serve.experiments.store import Measured

from .answers import Head
from .guard import key_of, user_of
from .keys import Key
from .problems import Json, Problem, problem_of
from .reading import TEXTS, labels_of
from .service import Service
from .wire import Classify, Load, Unload

__all__ = ["AdapterRoutes"]


UNKNOWN = "the adapter's folder says nothing of labels: it was not trained here. Ask for a completion."


class AdapterRoutes:
    """The endpoints about adapters, and the one that asks them for labels."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def models(self, request: Request) -> Any:
        """The base, the adapters and the experiments that the key may use."""
        key = key_of(request)
        base = self.service.base
        own = [_model(base, None)] if key.may_use(base) else []
        found = [info.name for info in self.service.names.visible(key)]
        named = dict.fromkeys(
            [*found, *self.service.names.aliases(key)]
        )  # an alias may have the name of one of its arms
        return Json({"object": "list", "data": [*own, *(_model(name, base) for name in named)]})

    async def model(self, request: Request, name: str) -> Any:
        """One of them."""
        named = self.service.names.read(name, key_of(request))
        parent = self.service.base if named.adapters or named.trial else None
        return Json(_model(named.title, parent))

    async def adapters(self, request: Request) -> Any:
        """What is known of each adapter that the key may use."""
        key = key_of(request)
        data = [_said(info, key) for info in self.service.names.visible(key)]
        made = {"base": self.service.base, "writes": self.service.prompts.writes, "may_load": key.admin}
        return Json({"object": "list", **made, "data": data})

    async def load(self, request: Request, body: Load) -> Any:
        """Serve the adapter in a folder under a name, in place of what has the name now."""
        _check_admin(key_of(request))
        names, name = self.service.names, body.lora_name
        if name == names.base:
            raise Problem(400, f"{name!r} is the base's own name. Choose another.", param="lora_name")
        if name.lstrip().startswith("{"):
            raise Problem(400, f"{name[:100]!r} would be read as a mix. Choose another name.", param="lora_name")
        experiment = names.experiment(name)
        if experiment is not None and name not in experiment.arms:
            raise Problem(400, f"{name!r} is an experiment. Choose another name, or drop it.", param="lora_name")
        if body.load_inplace is False and names.info(name) is not None:
            raise Problem(400, f"{name!r} is loaded. Say load_inplace true to replace it.", param="lora_name")
        await self._done(self.service.adapters.load, name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request, body: Unload) -> Any:
        """Serve an adapter no more; requests that came before end as they began."""
        _check_admin(key_of(request))
        if used := self.service.names.experiments_with(body.lora_name):
            said = f"{body.lora_name!r} is an arm of the experiment {used[0]!r}. Take it out there first."
            raise Problem(400, said, param="lora_name")
        await self._done(self.service.adapters.unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def classify(self, request: Request, body: Classify) -> Any:
        """The label of each text, and the probability of every label; of heads that give them, a number or tags."""
        service, key, texts = self.service, key_of(request), body.rows()
        named = service.names.read(body.model, key, user_of(request))
        if len(named.adapters) != 1 or not isinstance(named.route, str):
            raise Problem(400, "labels are what one adapter was trained on. Name one adapter.", param="model")
        if not 0 < len(texts) <= service.limits.max_answers:
            said = f"{len(texts)} texts are asked for. Give 1 to {service.limits.max_answers}."
            raise Problem(400, said, param="input")
        infos = service.names.infos(named)
        if await service.encode(lambda: service.prompts.prompting(infos)) is None:
            raise Problem(400, UNKNOWN, param="model")
        head = Head("classify", named.title)
        await service.began(named, key, head)
        outcome, began = "failed", time.monotonic()
        try:
            found = await self._labels(named.adapters[0], texts)
            outcome = "done"
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            service.ended(named, Measured(outcome, first=time.monotonic() - began))
        service.tallies.classified(named, len(texts))
        data = [_labelled(number, *one) for number, one in enumerate(found)]
        made = {"id": head.id, "object": "list", "model": named.title, "data": data}
        made |= {} if head.arm is None else {"system_fingerprint": head.arm}
        return Json(made, headers=head.headers())

    async def _labels(self, name: str, texts: list[Any]) -> list[tuple[str, Prediction]]:
        """The task and what came of it, for each text. A version answers as what it is, whatever its folder holds."""
        service, found = self.service, list[tuple[str, Prediction]]()
        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]

            def read(bank: Any, some: list[Any] = some) -> list[tuple[str, Prediction]]:
                own = service.adapters.opened(name)
                prompting = service.rows.noted(own.notes, own.folder)
                if prompting is None:
                    raise Problem(400, UNKNOWN, param="model")
                said = labels_of(own.bank, own.name, some, prompting, service.rows)
                return [(prompting.template.task, one) for one in said]

            found += await service.call(read)
        return found

    async def _done(self, do: Any, *given: Any) -> None:
        """Do what may wait for the disk and the engine. Raises: Problem."""
        try:
            await asyncio.to_thread(do, *given)
        except Exception as error:
            raise problem_of(error) from None


def _check_admin(key: Key) -> None:
    if not key.admin:
        raise Problem(403, "loading and unloading need an admin's key (--add-key NAME --admin)", "not_admin")


def _model(name: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "inlay", "root": name, "parent": parent}


def _said(info: AdapterInfo, key: Key) -> dict[str, Any]:
    template = info.notes.template or {}
    made = {
        "name": info.name, "method": info.method, "rank": info.rank, "bytes": info.bytes, "loaded": info.loaded,
        "version": info.version, "last_used": info.last_used, "error": info.error, "kind": template.get("kind"),
        "task": template.get("task"), "labels": list(template.get("verbalizer") or ()),
    }  # fmt: skip
    return made | ({"path": str(info.path)} if key.admin else {})


def _labelled(number: int, task: str, found: Prediction) -> dict[str, Any]:
    made: dict[str, Any] = {"index": number}
    if task == "regress":
        made["value"] = float(found.answer) if found.answer else None
    elif task == "tag":
        made["tags"] = list(found.tags)
    else:
        made |= {"label": found.answer or None, "probabilities": found.probabilities}
    return made | ({"problem": found.problem} if found.problem else {})
