"""Optimizers, schedules and disturbances of training: each does what its name says, and goes on where it stopped."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F
from transformers import get_scheduler

import inlay
from inlay.errors import UsageError
from inlay.runs.state import pack, unpack
from inlay.runtime.forward import Segment, token_losses
from inlay.runtime.memory import TokenBudget
from inlay.training import schedules
from inlay.training.loop import add_learners, train, train_steps
from inlay.training.optimizers import OPTIMIZERS
from inlay.training.plan import Plan
from test_training import examples, same
from zoo import make

RATES = {"lion": 1e-3, "adafactor": 2e-2, "sgd": 1.0}


def plan_for(optimizer, **more):
    method = inlay.LoRA(r=64) if optimizer == "adamw-8bit" else inlay.LoRA(r=4)
    given = {"lr": RATES.get(optimizer, 1e-2), "batch_size": 4, "steps": 12, "seed": 1, "optimizer": optimizer}
    return Plan("a", method, **{**given, **more})


def go(bank, learners, until=None):
    losses = []
    for stepped in train_steps(bank, learners, examples(), TokenBudget(4096)):
        losses.append(stepped[0].loss)
        if stepped[0].step == until:
            break
    return losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer_learns_and_goes_on_where_it_stopped(optimizer):
    dtype = torch.float32
    plan = plan_for(optimizer)
    bank = inlay.attach(make("llama", dtype=dtype))
    losses = go(bank, add_learners(bank, [plan], 24))
    assert sum(losses[6:]) < sum(losses[:6])
    first = inlay.attach(make("llama", dtype=dtype))
    learners = add_learners(first, [plan], 24)
    before = go(first, learners, until=5)
    tensors = {}
    kept = pack(learners[0].state(), tensors)
    second = inlay.attach(make("llama", dtype=dtype))
    learners = add_learners(second, [plan], 24)
    learners[0].restore(unpack(kept, tensors))
    after = go(second, learners)
    assert before + after == losses
    for ours, theirs in zip(second.parameters("a"), bank.parameters("a"), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_free_adapter_is_used_where_it_is_averaged():
    bank = inlay.attach(make("llama"))
    learners = add_learners(bank, [plan_for("schedule-free")], 24)
    go(bank, learners, until=5)
    trained = learners[0].weights()
    with learners[0].averaged_weights():
        used = learners[0].weights()
    assert any(not torch.equal(used[name], trained[name]) for name in trained)
    for name, value in learners[0].weights().items():
        torch.testing.assert_close(value, trained[name])


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [1.0] * 4),
        ({"schedule": "constant", "warmup": 0.5}, [0.0, 0.5, 1.0, 1.0]),
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(settings, rates):
    bank = inlay.attach(make("llama"))
    learner = add_learners(bank, [plan_for("adamw", steps=4, lr=1.0, **settings)], 24)[0]
    seen = []
    for _ in range(4):
        seen.append(learner.schedule.get_last_lr()[0])
        learner.optimizer.step()
        learner.schedule.step()
    assert seen == pytest.approx(rates, abs=1e-4)


def test_loraplus_rates_are_the_references():
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {
        names[id(p)].split("base_model.model.")[1].replace(".default.weight", ""): group["lr"]
        for group in theirs.param_groups
        for p in group["params"]
    }
    bank = inlay.attach(make("llama"))
    plan = Plan("a", inlay.LoRA(r=4, loraplus_lr_ratio=16), lr=1e-3)
    learner = add_learners(bank, [plan], 24)[0]
    groups = learner.optimizer.param_groups
    found = {p.untyped_storage().data_ptr(): group["lr"] for group in groups for p in group["params"]}
    ours = {
        f"{path}.lora_{key}": found[p.untyped_storage().data_ptr()]
        for path, own in bank.adapters["a"].params.items()
        for key, p in own.items()
    }
    assert ours == pytest.approx(expected)


def test_label_smoothing_is_torchs():
    bank = inlay.attach(make("llama"))
    rows = examples(3)
    smooth = token_losses(bank, [Segment(None, row, smoothing=0.1) for row in rows])
    for row, losses in zip(rows, smooth, strict=True):
        ids = torch.tensor([row.ids])
        logits = bank.model(input_ids=ids).logits[0]
        at = [n for n, learned in enumerate(row.loss_mask) if learned and n]
        expected = F.cross_entropy(logits[[n - 1 for n in at]], ids[0, at], reduction="none", label_smoothing=0.1)
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_neftune_shakes_its_own_adapter_alone(name):
    dtype = torch.float32 if name == "bloom" else torch.float64
    shaken = Plan("shaken", inlay.LoRA(r=4), lr=1e-2, batch_size=3, steps=6, seed=1, neftune_alpha=5.0)
    prompt = Plan(
        "p", inlay.PromptTuning(num_virtual_tokens=2), lr=1e-2, batch_size=2, steps=6, seed=3, neftune_alpha=2.0
    )
    still = Plan("still", inlay.LoRA(r=4), lr=1e-2, batch_size=3, steps=6, seed=1)
    together = inlay.attach(make(name, dtype=dtype))
    train(together, [shaken, still, prompt], examples())
    for plan in (shaken, still, prompt):
        alone = inlay.attach(make(name, dtype=dtype))
        train(alone, [plan], examples())
        same(together, alone, plan.name, 2e-3 if name == "bloom" else 1e-8)
    different = [
        not torch.equal(a, b) for a, b in zip(together.parameters("shaken"), together.parameters("still"), strict=True)
    ]
    assert all(different)


def test_neftune_noise_has_the_papers_size():
    bank = inlay.attach(make("llama"))
    row = examples(1)[0]
    assert bank.packs
    seen = []
    hook = bank.model.model.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append((a or [k["hidden_states"]])[0]), with_kwargs=True
    )
    token_losses(bank, [Segment(None, row, step=0)])
    token_losses(bank, [Segment(None, row, neftune=5.0, step=0)])
    hook.remove()
    delta = (seen[1] - seen[0]).detach()
    bound = 5.0 / (delta[0].numel() ** 0.5)
    assert bound * 0.9 < float(delta.abs().max()) <= bound


def test_wrong_numbers_are_refused():
    for settings, said in (
        ({"optimizer": "adamx"}, "Did you mean 'adamw'"),
        ({"schedule": "up"}, "linear, cosine"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"neftune_alpha": -1}, "neftune_alpha"),
    ):
        bank = inlay.attach(make("llama"))
        with pytest.raises(UsageError, match=said):
            add_learners(
                bank,
                [
                    plan_for(
                        settings.get("optimizer", "adamw"), **{k: v for k, v in settings.items() if k != "optimizer"}
                    )
                ],
                24,
            )


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_the_reference(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    reference = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=30)
    ours = schedules.rates(name, 7, 30)
    for step in range(32):
        assert ours(step) == pytest.approx(reference.lr_lambdas[0](step), abs=1e-12)
