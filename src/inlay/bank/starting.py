"""Shows a method rows before it begins: they run through the base alone, and its probes see what its sites read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.methods.contract import Method, Probe, Site
from inlay.sites.observe import first_tensor
from inlay.sites.tiny import in_eval

__all__ = ["Batch", "Rows", "begin_from_rows"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that run together: `run` puts them through the base and gives their mean loss, None where they have none.

    `real` (tokens,) is which tokens are no padding, `answers` (tokens,) which of them bear loss; all where it is None.
    """

    run: Callable[[], Tensor | None]
    real: Tensor | None = None
    answers: Tensor | None = None


Rows = Sequence[Mapping[str, Any] | Batch]
"""Batches, or arguments of the model's forward: input_ids, attention_mask and labels (-100 bears no loss), if any."""


def begin_from_rows(
    method: Method, sites: Sequence[Site], model: nn.Module, rows: Rows | None, generator: torch.Generator
) -> tuple[Method, dict[str, dict[str, Tensor]]]:
    """The method and its parameters by site, when its probes have seen `rows`. Raises: UsageError where there are none,
    or they are not what the method needs."""
    if not rows:
        what = f"{method.title} begins from {method.start_rows} rows of data here, and there are none"
        raise UsageError(what, "Give them (bank.add(..., rows=batches)), or choose a start that needs none.")
    probes = {site.path: method.probe(site) for site in sites}
    batches = [row if isinstance(row, Batch) else _batch(model, row) for row in rows]
    with in_eval(model):
        _show(batches[0], (), {}, any(probe.gradients for probe in probes.values()))  # what a first call tries out
        for batch in batches:
            _show(batch, sites, probes, any(probe.gradients for probe in probes.values()))
    return method.begin(sites, probes, generator)


def _batch(model: nn.Module, inputs: Mapping[str, Any]) -> Batch:
    mask, labels, ids = (inputs.get(name) for name in ("attention_mask", "labels", "input_ids"))
    alike = isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape
    return Batch(
        lambda: getattr(model(**inputs), "loss", None),
        mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        labels.flatten() != -100 if alike and isinstance(labels, Tensor) else None,
    )


def _show(batch: Batch, sites: Sequence[Site], probes: Mapping[str, Probe], gradients: bool) -> None:
    watched = [(site.module, _Watch(site, probes[site.path], batch)) for site in sites]
    handles = [module.register_forward_hook(watch, with_kwargs=True) for module, watch in watched]
    try:
        with torch.set_grad_enabled(gradients):
            loss = batch.run()
        if gradients and loss is None:
            raise UsageError("the rows bear no loss, and the start needs gradients", "Give labels in each batch.")
        if loss is not None and loss.requires_grad:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """A forward hook on the module of a site."""

    def __init__(self, site: Site, probe: Probe, batch: Batch) -> None:
        self.site, self.probe, self.batch = site, probe, batch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = first_tensor(args, kwargs)
        if x is None or not x.is_floating_point() or not isinstance(out, Tensor):
            raise UsageError(f"{self.site.path} reads no vectors that a start could come from", "Leave it out.")
        x = x.detach()
        if not self.probe.gradients:
            self._see(x, None)
            return None
        # The frozen base has no graph before the first site: each site's output begins or goes on with one.
        y = (out if out.requires_grad else out.detach().requires_grad_()).clone()
        y.register_hook(lambda gradient: self._see(x, gradient))
        return y

    def _see(self, x: Tensor, gradient: Tensor | None) -> None:
        flat, grads = _vectors(x), None if gradient is None else _vectors(gradient)
        real, answers = self.batch.real, self.batch.answers
        if real is not None:
            if len(real) != len(flat):
                what = f"{self.site.path} reads {len(flat)} vectors of rows that have {len(real)} tokens"
                raise UsageError(what, "Give rows one by one, without a mask, or leave it out of the targets.")
            real = real.to(flat.device)
            flat, grads = flat[real], None if grads is None else grads[real]
            answers = None if answers is None else answers.to(flat.device)[real]
        if answers is None or len(answers) != len(flat):  # a decoder reads answers alone
            answers = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        self.probe.see(flat, answers.to(flat.device), grads)


def _vectors(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
