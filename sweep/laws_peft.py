"""Law 4: a checkpoint of HF PEFT loads here and gives the same logits, and the other way round."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import inlay

from .bases import Batch
from .case import Case, Checks
from .samples import shake
from .verdicts import BaseFails, Different, apart, same, verdict_of

__all__ = ["from_peft", "reload", "to_peft"]


class Saved:
    """Adapters of one bank, each in a folder of its own, and the logits of rows that use it."""

    def __init__(self, case: Case, names: Sequence[str]) -> None:
        self.held = tempfile.TemporaryDirectory()
        self.root, self.case = Path(self.held.name), case
        self.bank = case.shared(names)
        self.outputs: dict[str, Tensor] = {}

    def folder(self, name: str) -> str:
        """Where the adapter is; it is saved when it is first asked for. Raises: what saving it does."""
        folder = self.root / name
        if not folder.exists():
            self.bank.save(name, folder)
        return str(folder)

    def logits(self, name: str) -> Tensor:
        if name not in self.outputs:
            self.outputs[name] = _routed(self.case, self.bank, name)
        return self.outputs[name]

    def config(self, name: str) -> dict[str, Any]:
        return json.loads((Path(self.folder(name)) / "adapter_config.json").read_text(encoding="utf8"))

    def check_known(self, name: str) -> None:
        """Raises: BaseFails where the method is none of peft's."""
        import peft

        if (kind := self.config(name).get("peft_type")) not in {str(k.value) for k in peft.PeftType}:
            raise BaseFails(f"peft has no method {kind}")


def _saved(case: Case, names: Sequence[str]) -> Saved:
    if (held := vars(case).get("saved")) is None or set(held.bank.adapters) < set(names):
        held = vars(case)["saved"] = Saved(case, names)
    return held


def to_peft(case: Case, names: Sequence[str]) -> Checks:
    """bank.save, then PeftModel.from_pretrained on the plain base."""
    saved = _saved(case, names)
    return {name: verdict_of(lambda n=name: _to_peft(case, saved, n)) for name in names}


def from_peft(case: Case, names: Sequence[str]) -> Checks:
    """A fresh model of peft with the settings that bank.save wrote, shaken and saved, then bank.load."""
    saved, bank = _saved(case, names), inlay.attach(case.base.make())
    return {name: verdict_of(lambda n=name: _from_peft(case, saved, bank, n)) for name in names}


def reload(case: Case, names: Sequence[str]) -> Checks:
    """bank.save, then bank.load into a fresh bank."""
    saved, bank = _saved(case, names), inlay.attach(case.base.make())

    def check(name: str) -> None:
        folder = saved.folder(name)
        bank.load(name, folder)
        same("loaded again", _routed(case, bank, name), saved.logits(name), 10 * case.tolerance.output)

    return {name: verdict_of(lambda n=name: check(n)) for name in names}


def _routed(case: Case, bank: inlay.Bank, name: str) -> Tensor:
    with torch.no_grad(), bank.route([name] * 2):
        return _flat(case.base.run(bank.model, _batch(case)))


def _batch(case: Case) -> Any:
    return case.base.batch([case.base.maker.row(5, seed) for seed in (0, 1)])


def _flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([out.flatten() for out in outputs])


def _to_peft(case: Case, saved: Saved, name: str) -> None:
    import peft

    folder = saved.folder(name)
    saved.check_known(name)
    ours = saved.logits(name)
    try:
        model = peft.PeftModel.from_pretrained(case.base.make(), folder).eval().to(case.base.dtype)
        theirs = _theirs(case, model, ours)
    except Exception as error:
        raise _blame(case, folder, error) from error
    _compare("ours in peft", case, saved, name, theirs, ours, model)


def _compare(what: str, case: Case, saved: Saved, name: str, theirs: Tensor, ours: Tensor, model: Any) -> None:
    """Raises: Different, or BaseFails where that is peft's own affair."""
    bound = _bound(case, saved, name)
    if apart(theirs, ours) > bound and (fault := _own_fault(case, saved, name, model, theirs)):
        raise fault
    same(what, theirs, ours, bound)


def _own_fault(case: Case, saved: Saved, name: str, model: Any, theirs: Tensor) -> BaseFails | None:
    """Where peft itself does something else on this base than its method says."""
    with torch.no_grad():
        plain = _flat(case.base.run(case.plain, _batch(case)))
    if apart(theirs, plain) < 1e-9:
        return BaseFails("peft's adapter changes nothing on this base")
    if left := _left_out(model, saved.config(name).get("target_modules")):
        return BaseFails(f"peft takes {left} of this base for something else and leaves it out")
    if "PROMPT" in saved.config(name)["peft_type"] and (found := _by_embeddings(case, plain)) > 1e-6:
        return BaseFails(f"the plain base gives other logits for its own embeddings than for ids: {found:.2g} apart")
    fresh, before = _trained(case, saved.folder(name), saved.logits(name))
    with tempfile.TemporaryDirectory() as folder:
        import peft

        fresh.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(case.base.make(), folder).eval().to(case.base.dtype)
        found = apart(_theirs(case, again, saved.logits(name)), before)
    return BaseFails(f"peft's own file gives other logits in peft: {found:.2g} apart") if found > 1e-5 else None


def _left_out(model: Any, paths: Any) -> str:
    """The first module by its full path that is asked for and has no adapter of peft's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = dict(getattr(model.base_model, "model", model.base_model).named_modules())  # around none for virtual tokens
    named = [path for path in paths or () if path in inner] if isinstance(paths, list) else []
    return next((path for path in named if not isinstance(inner[path], BaseTunerLayer)), "")


def _by_embeddings(case: Case, plain: Tensor) -> float:
    """How far the plain base is from itself when it gets embeddings, as peft gives them behind virtual tokens."""
    batch, model = _batch(case), case.plain
    inputs = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    try:
        embedded = model.get_input_embeddings()(batch.inputs["input_ids"].to(next(model.parameters()).device))
        with torch.no_grad():
            out = case.base.run(model, Batch({**inputs, "inputs_embeds": embedded.detach()}, batch.spans))
    except Exception:  # it takes none: then peft's run has said so
        return 0.0
    return apart(_flat(out), plain)


def _from_peft(case: Case, saved: Saved, bank: inlay.Bank, name: str) -> None:
    folder = saved.folder(name)
    saved.check_known(name)
    ours = saved.logits(name)
    try:
        model, theirs = _trained(case, folder, ours)
    except BaseFails:  # perhaps peft takes the base with no task alone
        model, theirs = _trained(case, folder, ours, keep_task=False)
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(other)
        bank.load(name, other)
    _compare("peft's here", case, saved, name, theirs, _routed(case, bank, name), model)


def _trained(case: Case, folder: str, ours: Tensor, keep_task: bool = True) -> tuple[Any, Tensor]:
    """A model of peft by the settings in `folder`, with random adapters, and its logits.

    Raises: BaseFails where peft itself cannot make or run one.
    """
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        config.base_model_name_or_path = None
        if not keep_task:
            config.task_type = None
        model: Any = peft.get_peft_model(case.base.make(), config).eval()
        shake((p for p in model.parameters() if p.requires_grad), seed=3)
        model.to(case.base.dtype)
        return model, _theirs(case, model, ours)
    except Exception as error:
        raise BaseFails(f"peft itself: {type(error).__name__}: {str(error)[:200]}") from error


def _blame(case: Case, folder: str, error: Exception) -> Exception:
    """BaseFails where a fresh model of peft with the same settings fails as well; else Different."""
    said = f"{type(error).__name__}: {str(error)[:300]}"
    try:
        _trained(case, folder, torch.zeros(0))
    except BaseFails as theirs:
        try:
            _trained(case, folder, torch.zeros(0), keep_task=False)
        except BaseFails:
            return theirs
        return Different(f"peft opens it without our task_type alone: {said}")
    return Different(f"peft cannot open ours: {said}")


def _theirs(case: Case, model: Any, ours: Tensor) -> Tensor:
    """Logits of peft's model, without those of its virtual tokens."""
    batch = _batch(case)
    with torch.no_grad():
        out = case.base.run(model, batch)
    length = batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else 0
    if ours.numel() and out[0].ndim == 2 and len(out[0]) != length and sum(o.numel() for o in out) > ours.numel():
        out = [row[-(ours.numel() // len(out) // row.shape[-1]) :] for row in out]
    return _flat(out)


def _bound(case: Case, saved: Saved, name: str) -> float:
    """peft holds virtual tokens in float32 where it computes them."""
    kind = saved.config(name).get("peft_type", "")
    return max(1e-5 if "PROMPT" in kind or "PREFIX" in kind else 0.0, 100 * case.tolerance.output)
