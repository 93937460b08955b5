"""Multitask prompt tuning: a prompt that tasks share, each entry scaled by a task's own product of low rank.

    x' = [P * (U_t V_t); embed(x)]

Paper: Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning" (arXiv:2303.02861).
Shapes: P is (n, hidden), U (tasks, n, r), V (tasks, r, hidden). An adapter is one of the tasks. It is saved as one of
one task: what it learns of P does not fit the others' U and V any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.values import Count, Help

from .contract import Method, Params, Site
from .peft_fields import PROMPT_FIELDS, Fields
from .virtual import NotNegative, VirtualEmbeddings

__all__ = ["MultitaskPromptTuning"]

SOURCES = ("average_source_tasks", "exact_source_task", "only_source_shared")
"""HF PEFT's starts from another adapter's file."""
SIZE = 0.02
"""The standard deviation of U and V at their start, as in HF PEFT."""


@dataclass(frozen=True)
class MultitaskPromptTuning(VirtualEmbeddings):
    """Settings: what P starts as is said as in prompt tuning, where random ones are standard normal, as in HF PEFT;
    `num_ranks` is r; `task` is the one of `num_tasks` tasks that the adapter is.

    The learning rate is a third of prompt tuning's: the lower of three did better (docs/methods.md).
    """

    title = "Multitask prompt tuning"
    paper = "arXiv:2303.02861"
    peft_type = "MULTITASK_PROMPT_TUNING"
    lr = 3e-3
    peft_fields = Fields(
        read={
            "num_virtual_tokens": None, "num_ranks": 1, "num_tasks": 1, "num_transformer_submodules": None,
            "modules_to_save": None,
        },
        passed={**PROMPT_FIELDS.passed, "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0},
    )  # fmt: skip

    num_ranks: Annotated[Count, Help("rank of a task's own factor")] = 1
    num_tasks: Annotated[Count, Help("tasks that share the prompt")] = 1
    task: Annotated[NotNegative, Help("which of them the adapter is, counted from 0")] = 0

    def __post_init__(self) -> None:
        if str(self.init).lower() in SOURCES:
            what = f"init {self.init!r} begins from another adapter's file"
            raise UsageError(what, "bank.load that file, with the task that it is to go on from, and train it.")
        super().__post_init__()
        if self.task >= self.num_tasks:
            raise UsageError(f"task is {self.task}", f"There are {self.num_tasks}: 0 to {self.num_tasks - 1}.")

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        rows, width = self.num_virtual_tokens, sites[0].out_features
        prompt = self.start(rows, sites[0], generator)
        if self.init == "random":
            prompt = torch.randn(rows, width, generator=generator)
        shapes = {"U": (self.num_tasks, rows, self.num_ranks), "V": (self.num_tasks, self.num_ranks, width)}
        return {"P": prompt, **{name: SIZE * torch.randn(shape, generator=generator) for name, shape in shapes.items()}}

    def virtual(self, params: Params) -> Tensor:
        return params["P"] * (params["U"][self.task] @ params["V"][self.task])

    def export(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        own = {name: value if name == "P" else value[self.task][None] for name, value in params.items()}
        return replace(self, num_tasks=1, task=0), own

    def beside_whole_base(
        self, config: Mapping[str, Any], values: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site]
    ) -> tuple[Method, Mapping[str, Mapping[str, Tensor]]]:
        method, own = self.export(values[""], sites)
        return method, {**values, "": own}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        n, r, tasks, width = self.num_virtual_tokens, self.num_ranks, self.num_tasks, sites[0].out_features
        return {
            "P": ("prompt_embeddings", (n, width)),
            "U": ("prefix_task_cols", (tasks, n, r)),
            "V": ("prefix_task_rows", (tasks, r, width)),
        }

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        fields = {"num_virtual_tokens": self.num_virtual_tokens, "token_dim": sites[0].out_features}
        own = {"num_ranks": self.num_ranks, "num_tasks": self.num_tasks, "num_transformer_submodules": 1}
        return {**fields, **own, "prompt_tuning_init": "RANDOM"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> MultitaskPromptTuning:
        """`config` has a field of ours, `task`, where the caller of `bank.load` said one."""
        ranks, tasks = config.get("num_ranks") or 1, config.get("num_tasks") or 1
        if (config.get("num_transformer_submodules") or 1) != 1:
            what = "a multitask prompt for both an encoder and its decoder (num_transformer_submodules 2) has no equal"
            raise FormatError(what, "Load it with HF PEFT.")
        if tasks != 1 and config.get("task") is None:
            remedy = 'Say which: bank.load(name, path, task=0), or "task": 0 in adapter_config.json.'
            raise FormatError(f"the file holds a prompt that {tasks} tasks share", remedy)
        return cls(config["num_virtual_tokens"], num_ranks=ranks, num_tasks=tasks, task=config.get("task") or 0)
