"""Trains an adapter in transformers' Trainer, and in what is built on it, TRL's SFTTrainer for one."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from inlay.bank.bank import Bank
from inlay.bank.rates import rates_act
from inlay.errors import UsageError
from inlay.files import written_beside
from inlay.formats.tensors import read_tensors

from .processes import average_gradients, broadcast

__all__ = ["InlayCallback"]

STATE = "inlay_state.safetensors"
"""Beside a checkpoint's other files: the adapter's own tensors, as they are trained (a prefix's network too)."""


class InlayCallback(TrainerCallback):
    """Trains the adapter `name` of `bank` in a Trainer whose model is the bank's base, and saves it to `out`.

        trainer = Trainer(model=bank.model, args=args, train_dataset=rows)
        InlayCallback(bank, "it", out="adapter/").install(trainer)
        trainer.train()

    Adapters live beside the model, so what a Trainer does with the model's own parameters is done for theirs here:
    clipping by `max_grad_norm`, clearing gradients, checkpoints, resuming, the best one, and the average of gradients
    over processes (`torchrun`, `accelerate launch`). Every row goes through the adapter (`bank.set`), in
    `trainer.evaluate()` too. The Trainer puts the base in training mode: its dropout and the adapter's are on, drawn
    from torch's generator; `neftune_noise_alpha` acts on a row's own tokens.
    """

    def __init__(self, bank: Bank, name: str, out: str | Path | None = None) -> None:
        if name not in bank.adapters:
            raise UsageError(f"no adapter is called {name!r}", f"Adapters here: {', '.join(bank.adapters) or 'none'}.")
        for method in bank.adapters[name].methods:
            if method.changes_values:
                what = f"{method.title} changes its parameters between steps, which a Trainer does not ask it to"
                raise UsageError(what, "Train it with `inlay train`.")
        self.bank, self.name, self.out = bank, name, None if out is None else Path(out)
        self.parameters = list(bank.adapters[name].parameters())

    def install(self, trainer: Any) -> Any:
        """Put this callback, an optimizer over the adapter, and saving of the adapter alone into `trainer`, and route
        all rows through the adapter.

        The optimizer has the rates that the adapter's methods say (LoRA+). One that was given stays, if it trains the
        adapter. Raises: UsageError where trainer and bank differ, or weights would be sharded or copied.
        """
        if trainer.model is not self.bank.model:
            raise UsageError("the trainer's model is not the bank's base", "Give it bank.model.")
        _check_whole(trainer.args)
        if trainer.optimizer is None:
            kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args)
            groups = self.bank.parameter_groups(settings["lr"], self.name)
            trainer.optimizer = kind(groups, weight_decay=trainer.args.weight_decay, **settings)
        self.bank.set(self.name)
        self._keep_unwrapped(trainer.accelerator)
        trainer.add_callback(self)
        # A Trainer keeps the whole model at each checkpoint, and puts it back; here that is the adapter.
        trainer._save = lambda output_dir=None, state_dict=None: self.save(output_dir or trainer.args.output_dir)
        trainer._load_from_checkpoint = lambda path, model=None: self.load(path)
        trainer._load_best_model = lambda: self.load(trainer.state.best_model_checkpoint)
        return trainer

    def _keep_unwrapped(self, accelerator: Any) -> None:
        """DistributedDataParallel takes no model without parameters to train: gradients are averaged here."""
        prepare = accelerator.prepare_model

        def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
            whole = evaluation_mode or model is self.bank.model
            return prepare(model, device_placement=device_placement, evaluation_mode=whole)

        accelerator.prepare_model = prepare_model

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
        groups = given["optimizer"].param_groups
        trained = {id(p) for group in groups for p in group["params"]}
        if not all(id(p) in trained for p in self.parameters):
            raise UsageError(
                "the optimizer does not train the adapter", "Call install, or give it bank.parameter_groups(lr)."
            )
        if not rates_act(self.bank.adapters[self.name], groups):
            warnings.warn(
                f"the optimizer's rates are not those that the methods of {self.name!r} ask for (LoRA+). "
                "Give it bank.parameter_groups(lr), or let install make it.",
                stacklevel=2,
            )
        _check_whole(args)
        broadcast(self.parameters)  # each process may have drawn a start of its own
        self.bank.set(self.name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if all(parameter.grad is None for parameter in self.parameters):
            raise UsageError(
                f"no gradient reached the adapter {self.name!r} at step {state.global_step + 1}",
                "Open no route of another adapter around trainer.train(), and leave bank.set as it was.",
            )
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.max_grad_norm or math.inf)
        scaled = getattr(given.get("optimizer"), "scaler", None) is not None  # float16: such a step is left out
        if not bool(norm.isfinite()) and not scaled:
            raise UsageError(
                f"the gradient is {float(norm)} at step {state.global_step + 1}", "Lower the learning rate."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.out is not None:
            self.bank.save(self.name, self.out)


def _check_whole(args: Any) -> None:
    """Raises: UsageError where the Trainer would shard or copy the base, beside which the adapter stands."""
    if args.n_gpu > 1:
        raise UsageError(
            f"torch's DataParallel would copy the base to {args.n_gpu} GPUs, without its adapters",
            "Start a process for each GPU with torchrun or accelerate launch, or show one: CUDA_VISIBLE_DEVICES=0.",
        )
    if args.deepspeed or args.fsdp:
        kind = "DeepSpeed" if args.deepspeed else "FSDP"
        raise UsageError(
            f"{kind} shards the base's weights, which adapters beside it read whole",
            "Leave it out: each process holds the frozen base, and the adapter's gradients are averaged.",
        )
