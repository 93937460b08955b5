"""The estimate of a run's memory is what its steps really hold, counted tensor by tensor."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.methods.table import METHODS
from inlay.runs import estimate
from inlay.runtime.held import held_bytes
from inlay.runtime.memory import MB, TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_training import examples
from zoo import small


class Counted(TorchDispatchMode):
    """The most bytes that storages which operators touch have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        for made in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(made, torch.Tensor) and (key := made.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = made.untyped_storage().nbytes()
                self.now += self.sizes[key]
                weakref.finalize(made.untyped_storage(), self.forget, key)
        self.most = max(self.most, self.now)
        return given

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def attached(dtype=torch.float32):
    tf.set_seed(0)
    config = tf.LlamaConfig(**small(hidden_size=96, intermediate_size=192, tie_word_embeddings=True))
    return inlay.attach(tf.LlamaForCausalLM(config).to(dtype))


@pytest.fixture
def bare(monkeypatch):
    """The estimate without what the process holds besides."""
    monkeypatch.setattr(estimate, "current_memory_mb", lambda device: 0.0)
    monkeypatch.setattr(estimate, "KERNELS_MB", 0)


@pytest.mark.parametrize("at_once", [4096, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_tuning_holds_what_its_estimate_says(bare, dtype, at_once):
    bank = attached(dtype)
    (learner,) = add_learners(bank, [Plan("a", METHODS["full"](), batch_size=4, steps=3)], 24)
    own = sum(p.numel() * p.element_size() for p in bank.model.parameters()) / MB
    trained = sum(p.numel() * p.element_size() for p in learner.parameters) / MB
    said = estimate.estimate_mb(bank, [learner], examples(), TokenBudget(at_once))
    with Counted() as counted:
        for _ in train_steps(bank, [learner], examples(), TokenBudget(at_once)):
            pass
    held = counted.most / MB - own - trained  # beyond base and adapter, which are there before
    assert trained > 0.5 and 0.95 < said["estimate_mb"] / held < 1.5


def test_a_copy_of_the_best_is_counted_where_rows_are_scored(bare):
    bank = attached()
    (learner,) = add_learners(bank, [Plan("a", METHODS["full"](), batch_size=4, steps=3)], 24)
    own = sum(p.numel() * p.element_size() for p in learner.parameters) / MB
    plain, scored = (
        estimate.estimate_mb(bank, [learner], examples(), TokenBudget(4096), scored=scored)["estimate_mb"]
        for scored in (False, True)
    )
    assert plain + own <= scored <= plain + 2.01 * own


def test_looking_at_a_forward_leaves_nothing_behind():
    bank = attached()
    (learner,) = add_learners(bank, [Plan("a", inlay.LoRA(), batch_size=4, steps=3)], 24)

    def look() -> float:
        return estimate._held(bank, learner, examples()[0], estimate.GENERATE, torch.device("cpu")).saved

    with Counted() as counted:
        saved = look()
        first = counted.now
        look()
    assert saved > 5000 and counted.now < first + saved / 2


def test_what_a_forward_holds_beside_what_it_saved():
    weight = torch.zeros(64, 8, requires_grad=True)
    kept = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.made = torch.eye(32)  # held by the function, unknown to autograd
            ctx.save_for_backward(x, saved := x * 2)
            return saved.sum()

        @staticmethod
        def backward(ctx, *grads):  # pyright: ignore
            return grads[0].expand(64, 8)

    found = held_bytes([weight], lambda: Function.apply(weight))  # pyright: ignore
    assert found.saved == 64 * 8 * 4 and 32 * 32 * 4 <= found.beside <= 32 * 32 * 4 + 64
    kept.append(torch.eye(128))
    assert held_bytes([weight], lambda: (weight * 1.0).sum()).beside < 100


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_blocks_that_are_computed_again_are_counted(bare, method):
    tf.set_seed(0)
    config = tf.LlamaConfig(**small(hidden_size=96, intermediate_size=384, num_hidden_layers=6))
    bank = inlay.attach(tf.LlamaForCausalLM(config))
    (learner,) = add_learners(bank, [Plan("a", METHODS[method](), batch_size=8, steps=3)], 24)
    said = {
        again: estimate.estimate_mb(bank, [learner], examples(), TokenBudget(4096), recompute=again)["estimate_mb"]
        for again in (False, True)
    }
    with Counted() as counted:
        before = counted.now
        for _ in train_steps(bank, [learner], examples(), TokenBudget(4096), True):
            pass
    base = sum(p.numel() * p.element_size() for p in [*bank.model.parameters(), *learner.parameters]) / MB
    held = (counted.most - before) / MB - base
    assert said[True] < 0.85 * said[False] and 0.85 < said[True] / held < 1.5
