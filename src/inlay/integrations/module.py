"""A base and one adapter of its bank as one torch module, for what wants to see trainable parameters in its model."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.bank.bank import Bank
from inlay.errors import UsageError

__all__ = ["InlayModule"]


class InlayModule(nn.Module):
    """The bank's base under the route of the adapter `name`, with the adapter's parameters as its trainable ones.

    torch's DistributedDataParallel, accelerate's `prepare` and Lightning look for parameters to train in the model that
    they are given; the base of a bank has none. `bank.save` saves the adapter; this module's own state dict holds the
    base as well.

        module = InlayModule(bank, "it")
        optimizer = torch.optim.AdamW(bank.parameter_groups(1e-3, "it"))
        module, optimizer, rows = accelerator.prepare(module, optimizer, rows)
        loss = module(input_ids=ids, attention_mask=mask, labels=labels).loss

    Raises: UsageError where no adapter has the name.
    """

    def __init__(self, bank: Bank, name: str) -> None:
        super().__init__()
        if name not in bank.adapters:
            raise UsageError(f"no adapter is called {name!r}", f"Adapters here: {', '.join(bank.adapters) or 'none'}.")
        self._bank, self._name = bank, name
        self.base = bank.model
        self.adapter = nn.ParameterList(bank.adapters[name].parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base gives for these arguments, with the adapter on every row."""
        with self._bank.route([self._name]):
            return self.base(*args, **kwargs)
