"""Trains an adapter in transformers' Trainer, and in what is built on it, TRL's SFTTrainer for one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from inlay.bank.bank import Bank
from inlay.errors import UsageError
from inlay.files import written_beside
from inlay.formats.tensors import read_tensors

__all__ = ["InlayCallback"]

STATE = "inlay_state.safetensors"
"""Beside a checkpoint's other files: the adapter's own tensors, as they are trained (a prefix's network too)."""


class InlayCallback(TrainerCallback):
    """Trains the adapter `name` of `bank` in a Trainer whose model is the bank's base, and saves it to `out`.

        trainer = Trainer(model=bank.model, args=args, train_dataset=rows)
        InlayCallback(bank, "it", out="adapter/").install(trainer)
        trainer.train()

    Adapters live beside the model, so what a Trainer does with the model's own parameters is done for theirs here:
    clipping by `max_grad_norm`, clearing gradients, checkpoints, resuming, the best one. Every row goes through the
    adapter (`bank.set`). The Trainer puts the base in training mode: dropout that its configuration names is on.
    """

    def __init__(self, bank: Bank, name: str, out: str | Path | None = None) -> None:
        if name not in bank.adapters:
            raise UsageError(f"no adapter is called {name!r}", f"Adapters here: {', '.join(bank.adapters) or 'none'}.")
        self.bank, self.name, self.out = bank, name, None if out is None else Path(out)
        self.parameters = list(bank.parameters(name))

    def install(self, trainer: Any) -> Any:
        """Put this callback, an optimizer over the adapter, and saving of the adapter alone into `trainer`.

        An optimizer that was given stays, if it trains the adapter. Raises: UsageError where trainer and bank differ.
        """
        if trainer.model is not self.bank.model:
            raise UsageError("the trainer's model is not the bank's base", "Give it bank.model.")
        if trainer.optimizer is None:
            kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args)
            trainer.optimizer = kind(self.parameters, weight_decay=trainer.args.weight_decay, **settings)
        trainer.add_callback(self)
        # A Trainer keeps the whole model at each checkpoint, and puts it back; here that is the adapter.
        trainer._save = lambda output_dir=None, state_dict=None: self.save(output_dir or trainer.args.output_dir)
        trainer._load_from_checkpoint = lambda path, model=None: self.load(path)
        trainer._load_best_model = lambda: self.load(trainer.state.best_model_checkpoint)
        return trainer

    def save(self, folder: str | Path) -> None:
        """Write the adapter in HF PEFT's layout, with the tensors that resuming needs."""
        self.bank.save(self.name, folder)
        with written_beside(Path(folder) / STATE) as beside:
            save_file({str(n): p.detach().contiguous() for n, p in enumerate(self.parameters)}, beside)

    def load(self, folder: str | Path) -> None:
        """The inverse of `save`. Raises: FormatError where the file is broken, UsageError where it is another's."""
        saved = read_tensors(Path(folder) / STATE)
        shapes = {str(n): p.shape for n, p in enumerate(self.parameters)}
        if {n: value.shape for n, value in saved.items()} != shapes:
            raise UsageError(f"{folder} holds another adapter", "Make the adapter with the settings it had.")
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters):
                parameter.copy_(saved[str(n)])

    # ---- what the Trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        trained = {id(p) for group in given["optimizer"].param_groups for p in group["params"]}
        if not all(id(p) in trained for p in self.parameters):
            raise UsageError("the optimizer does not train the adapter", "Call install, or give it bank.parameters().")
        self.bank.set(self.name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm or math.inf)
        if not bool(norm.isfinite()):
            raise UsageError(
                f"the gradient is {float(norm)} at step {state.global_step + 1}", "Lower the learning rate."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.out is not None:
            self.bank.save(self.name, self.out)
