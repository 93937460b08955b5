"""/v1/experiments: aliases over weighted arms, set and looked at; /v1/feedback: what people think of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from inlay.data.yaml import read_yaml
from inlay.errors import UsageError
from inlay.serve.experiments.arms import Experiment, make_experiment
from inlay.serve.experiments.results import Results
from inlay.serve.experiments.store import DAYS, Store

from .guard import key_of
from .names import Names
from .problems import Json, Problem, problem_of
from .service import Service
from .wire import Feedback, SetArms

__all__ = ["ExperimentRoutes", "set_from_file", "start"]

T = TypeVar("T")


class ExperimentRoutes:
    """The endpoints about experiments. All but feedback need an admin's key: they name all arms."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._results = None if service.experiments is None else Results(service.experiments)

    async def all(self, request: Request) -> Any:
        """The results of all experiments."""
        store, results = self._opened(request)
        return Json({"object": "list", "data": await _done(lambda: [results.of(one) for one in store.all()])})

    async def one(self, request: Request, name: str) -> Any:
        """The results of one."""
        store, results = self._opened(request)
        found = await _done(lambda: store.get(name))
        if found is None:
            raise _unknown(name)
        return Json(await _done(lambda: results.of(found)))

    async def put(self, request: Request, name: str, body: SetArms) -> Any:
        """Make an experiment, or give it other arms and weights; what arms have seen stays."""
        store, results = self._opened(request)

        def work() -> tuple[bool, Any]:
            made = _checked(self.service.names, name, body.arms)
            return store.put(made), results.of(made)

        new, made = await _done(work)
        return Json(made, 201 if new else 200)

    async def drop(self, request: Request, name: str) -> Any:
        """Forget an experiment and all that it has seen."""
        store, _ = self._opened(request)
        if not await _done(lambda: store.drop(name)):
            raise _unknown(name)
        return Json({"name": name, "deleted": True})

    async def feedback(self, request: Request, body: Feedback) -> Any:
        """What somebody thinks of an answer that the same key asked an experiment for. The first value stands."""
        store, key, value = self._store(), key_of(request), body.rated()
        asked = None if key.admin else key.name
        found = await _done(lambda: store.give(body.id, value, body.comment, asked))
        if found is None:
            said = f"no experiment of the last {DAYS} days gave an answer {body.id!r} to this key"
            raise Problem(404, said, "answer_not_found", "id")
        if not found[1]:
            raise Problem(409, f"other feedback to {body.id!r} was given before, and stands", "feedback_given", "value")
        return Json({"id": body.id, "arm": found[0], "value": value})

    def _store(self) -> Store:
        if self.service.experiments is None:
            said = "this server keeps no experiments: start it with --state FILE, or --experiments FILE.yaml"
            raise Problem(404, said, "no_experiments")
        return self.service.experiments

    def _opened(self, request: Request) -> tuple[Store, Results]:
        if not key_of(request).admin:
            raise Problem(403, "experiments need an admin's key (--add-key NAME --admin)", "not_admin")
        store = self._store()
        assert self._results is not None
        return store, self._results


def start(service: Service, path: str | None, on_message: Callable[[str], None]) -> None:
    """Set the experiments of a file, if there is one, and say which arms are not served; a service without a file for
    its state has none. Raises: UsageError."""
    names, store = service.names, service.experiments
    if store is None:
        return
    if path is not None:
        set_from_file(names, store, path, on_message)
    for one in store.all():
        for arm in one.arms:
            if not names.is_model(arm):
                on_message(f"the arm {arm!r} of the experiment {one.name!r} is not served: who gets it is refused")


def set_from_file(names: Names, store: Store, path: str, on_message: Callable[[str], None]) -> None:
    """Set the experiments that stand in a YAML file; those of earlier go on, and are said.

    Raises: UsageError where the file cannot be read, or an experiment in it is wrong; then none is set.
    """
    try:
        given = read_yaml(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read ({why})", "Write NAME: {ARM: WEIGHT, ARM: WEIGHT}.") from None
    if not isinstance(given, Mapping) or not all(isinstance(arms, Mapping) for arms in given.values()):
        raise UsageError(f"{path} holds no experiments", "Write NAME: {ARM: WEIGHT, ARM: WEIGHT}, one a line.")
    made = [_checked(names, str(name), {str(arm): w for arm, w in arms.items()}) for name, arms in given.items()]
    for one in made:
        store.put(one)
    for name in sorted({one.name for one in store.all()} - {one.name for one in made}):
        on_message(f"the experiment {name!r} is not in {path}, and goes on: DELETE /v1/experiments/{name} ends it")


def _checked(names: Names, name: str, arms: Mapping[str, float]) -> Experiment:
    """Raises: UsageError."""
    return make_experiment(name, arms, names.base, lambda one: names.info(one) is not None, names.is_model)


def _unknown(name: str) -> Problem:
    return Problem(404, f"no experiment is called {name[:100]!r}. GET /v1/experiments lists them", "not_found")


async def _done(do: Callable[[], T]) -> T:
    """Do what may wait for the disk. Raises: Problem."""
    try:
        return await asyncio.to_thread(do)
    except Exception as error:
        raise problem_of(error) from None
