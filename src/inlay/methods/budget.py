"""AdaLoRA's budget of singular values: how important each triplet is, and which are left."""

from __future__ import annotations

import torch
from torch import Tensor

from .around import Values

__all__ = ["Budget", "pruned"]


class Budget:
    """What is left of all E of `values` (path -> A (r, in), E (r, 1), B (out, r)) after a step: `target` at step `end`,
    all until step `begin`.

    `state` holds the averages of importance by "path:name:i" (sensitivity) and "path:name:u" (its uncertainty), until
    the end, and from then on which triplets are alive, by "path:alive".
    """

    def __init__(self, values: Values, target: int, begin: int, end: int, state: dict[str, Tensor]) -> None:
        self.values, self.target, self.begin, self.end, self.state = values, target, begin, end, state
        self.first = sum(len(own["E"]) for own in values.values())

    def at(self, step: int) -> int:
        """The budget at `step`, a cubic from all to `target`."""
        if step <= self.begin:
            return self.first
        if step >= self.end:
            return self.target
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int((self.first - self.target) * left**3 + self.target)

    @torch.no_grad()
    def update(self, gradients: Values, beta1: float, beta2: float) -> None:
        """Take a step's `gradients` into the averages."""
        for path, own in self.values.items():
            for name, value in own.items():
                now = (value * gradients[path][name]).abs()
                keys = f"{path}:{name}:i", f"{path}:{name}:u"
                mean, doubt = (self.state.get(key, torch.zeros_like(value)) for key in keys)
                mean = beta1 * mean + (1 - beta1) * now
                self.state[keys[0]], self.state[keys[1]] = mean, beta2 * doubt + (1 - beta2) * (now - mean).abs()

    @torch.no_grad()
    def allocate(self, step: int) -> None:
        """Set E of the least important triplets to zero; at the end for good."""
        cut = self.first - self.at(step)
        alive = {path: torch.ones(len(own["E"]), dtype=torch.bool) for path, own in self.values.items()}
        if cut > 0:
            scores = {path: self._importance(path) for path in self.values}
            bound = torch.cat([*scores.values()]).kthvalue(cut).values
            for path, own in self.values.items():
                own["E"].masked_fill_((scores[path] <= bound)[:, None], 0)
                alive[path] = scores[path] > bound
        if step >= self.end:
            self.state.clear()
            self.state.update({f"{path}:alive": keep for path, keep in alive.items()})

    @torch.no_grad()
    def hold(self) -> None:
        """Keep those at zero that have ended there."""
        for path, own in self.values.items():
            alive = self.state.get(f"{path}:alive")
            if alive is not None:
                own["E"].masked_fill_(~alive.to(own["E"].device)[:, None], 0)

    def _importance(self, path: str) -> Tensor:
        """Of each triplet (r,)."""
        a, e, b = (self.state[f"{path}:{name}:i"] * self.state[f"{path}:{name}:u"] for name in ("A", "E", "B"))
        return e[:, 0] + (a.mean(1) + b.mean(0))


def pruned(values: Values) -> dict[str, dict[str, Tensor]] | None:
    """`values` without the triplets whose E is zero; None where that is all of them or none."""
    alive = {path: own["E"].detach()[:, 0] != 0 for path, own in values.items()}
    if len({bool(one) for keep in alive.values() for one in keep}) < 2:
        return None
    return {
        path: {"A": own["A"][alive[path]], "E": own["E"][alive[path]], "B": own["B"][:, alive[path]]}
        for path, own in values.items()
    }
