"""What a model's name means: an adapter, the plain base, a mix of adapters, or an experiment; and who may use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inlay.batch.route import RowSpec
from inlay.serve.adapters import AdapterStore
from inlay.serve.experiments.arms import Experiment, Trial, draw, unit_of
from inlay.serve.refusals import UnknownAdapter

from .keys import EVERYBODY, Key
from .problems import Problem
from .wire import Model

if TYPE_CHECKING:
    from inlay.serve.entries import AdapterInfo
    from inlay.serve.experiments.store import Store

__all__ = ["Named", "Names"]

MOST = 16
"""Adapters of one mix."""


@dataclass(frozen=True)
class Named:
    """A model that somebody asked for: its `route` by the names that people know, and what answers call it. `trial`
    says which arm it is, where the name is an experiment's.
    """

    route: RowSpec
    title: str
    adapters: tuple[str, ...]
    trial: Trial | None = None


class Names:
    """The base's own name, those of experiments and those of adapters: what comes first here is found first."""

    def __init__(self, base: str, store: AdapterStore, experiments: Store | None = None) -> None:
        self.base, self.store, self.experiments = base, store, experiments

    def read(self, model: Model, key: Key, user: str | None = None) -> Named:
        """What a key's model means for a `user`, who stays with one arm of an experiment; None is a user of their own.

        Raises: Problem: 404 for a name that is not there or that the key may not use, 400 for what is no mix.
        """
        found = None if not isinstance(model, str) or model == self.base else self.experiment(model)
        return self.direct(model, key) if found is None else self._drawn(found, key, user)

    def experiment(self, name: str) -> Experiment | None:
        return None if self.experiments is None else self.experiments.get(name)

    def aliases(self, key: Key) -> list[str]:
        """The experiments that a key may use."""
        known = [] if self.experiments is None else self.experiments.all()
        return [one.name for one in known if key.may_use(one.name)]

    def experiments_with(self, adapter: str) -> list[str]:
        """The experiments that an adapter takes part in."""
        known = [] if self.experiments is None else self.experiments.all()
        return [one.name for one in known if any(adapter in self._parts(arm) for arm in one.arms)]

    def _parts(self, arm: str) -> tuple[str, ...]:
        try:
            return (arm, *self.direct(arm, EVERYBODY).adapters)
        except Problem:
            return (arm,)

    def is_model(self, arm: str) -> bool:
        """Whether something could be an arm of an experiment."""
        try:
            self.direct(arm, EVERYBODY)
        except Problem:
            return False
        return True

    def _drawn(self, experiment: Experiment, key: Key, user: str | None) -> Named:
        """An arm of an experiment: who may use the alias may use its arms by it. Raises: Problem."""
        if not key.may_use(experiment.name):
            raise self.unknown(experiment.name)
        unit = unit_of(key.name, user)
        arm = draw(experiment, unit)
        try:
            own = self.direct(arm, EVERYBODY)
        except Problem:
            said = f"the arm {arm!r} of the experiment {experiment.name!r} is not served any more. Set other arms."
            raise Problem(503, said, "arm_not_served", "model") from None
        return Named(
            own.route, experiment.name, own.adapters, Trial(experiment.name, arm, unit, phase=experiment.phase)
        )

    def direct(self, model: Model, key: Key) -> Named:
        """What a name means that is no experiment's. Raises: Problem, as `read` does."""
        mix = self._mix(model)
        if mix is None:
            assert isinstance(model, str)
            if not key.may_use(model) or (model != self.base and self.info(model) is None):
                raise self.unknown(model)
            own = () if model == self.base else (model,)
            return Named(model if own else None, model, own)
        for name in mix:
            if not key.may_use(name) or self.info(name) is None or name == self.base:
                raise self.unknown(name)
        return Named(mix, json.dumps(mix, ensure_ascii=False), tuple(mix))

    # ---- adapters

    def visible(self, key: Key) -> list[AdapterInfo]:
        """The adapters that a key may use."""
        return [info for info in self.store.known() if key.may_use(info.name) and info.name != self.base]

    def info(self, name: str) -> AdapterInfo | None:
        try:
            return self.store.info(name)
        except UnknownAdapter:
            return None

    def infos(self, named: Named) -> list[AdapterInfo]:
        """What is known of a model's adapters. Raises: Problem where one has gone meanwhile."""
        found = [(name, self.info(name)) for name in named.adapters]
        for name, info in found:
            if info is None:
                raise self.unknown(name)
        return [info for _, info in found if info is not None]

    def unknown(self, name: str) -> Problem:
        said = f"the model {name[:100]!r} does not exist, or the key may not use it. GET /v1/models lists those it may"
        return Problem(404, said, "model_not_found", "model")

    def _mix(self, model: Model) -> dict[str, float] | None:
        """The weights by name; None for a single name."""
        given: object = model
        if isinstance(model, str):
            if not model.lstrip().startswith("{") or self.info(model) is not None:
                return None
            try:
                given = json.loads(model)
            except (ValueError, RecursionError):
                return None
        if not isinstance(given, dict) or not 0 < len(given) <= MOST:
            raise Problem(400, f'a mix is {{"name": weight}} of 1 to {MOST} adapters', param="model")
        if not all(_is_weight(weight) for weight in given.values()):
            raise Problem(400, "the weights of a mix are numbers from -100 to 100", param="model")
        return {str(name): float(weight) for name, weight in given.items()}


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -100 <= value <= 100
