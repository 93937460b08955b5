"""Contenders trained together equal their solo runs, whatever becomes of the others."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.training.loop import train
from inlay.training.plan import Plan
from zoo import make


def examples(count=24):
    torch.manual_seed(3)
    made = []
    for sample in range(count):
        n = int(torch.randint(4, 9, ()))
        ids = tuple(torch.randint(3, 48, (n,)).tolist())
        made.append(Example(ids, tuple(i >= n - 3 for i in range(n)), sample))
    return made


PLANS = [
    Plan("lora", inlay.LoRA(r=4, dropout=0.3), lr=1e-2, batch_size=3, steps=20, seed=1),
    Plan("wide", inlay.LoRA(r=8, targets="qv"), lr=3e-2, batch_size=5, steps=20, seed=2, schedule="cosine", warmup=0.2),
    Plan("prefix", inlay.PrefixTuning(num_virtual_tokens=3), lr=1e-1, batch_size=2, steps=20, seed=3, clip=0.5),
]


def run(name, plans, dtype=torch.float64, **settings):
    bank = inlay.attach(make(name, dtype=dtype))
    losses = {plan.name: [] for plan in plans}

    def note(contenders):
        for contender in contenders:
            if len(losses[contender.plan.name]) < contender.step:
                losses[contender.plan.name].append(contender.loss)

    contenders = train(bank, plans, examples(), on_step=note, **settings)
    return bank, losses, {c.plan.name: c for c in contenders}


def learns(losses):
    return sum(losses[10:]) < sum(losses[:10])


def same(bank, solo, name, bound):
    for ours, alone in zip(bank.parameters(name), solo.parameters(name), strict=True):
        torch.testing.assert_close(ours, alone, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_raced_adapter_equals_its_solo_run(name, dtype, bound):
    if name == "bloom" and dtype == torch.float64:
        dtype, bound = torch.float32, 2e-3  # its softmax knows no float64
    bank, losses, contenders = run(name, PLANS, dtype)
    for plan in PLANS:
        solo, alone, _ = run(name, [plan], dtype)
        assert contenders[plan.name].step == 20 and len(losses[plan.name]) == 20
        torch.testing.assert_close(losses[plan.name], alone[plan.name], rtol=bound, atol=bound)
        same(bank, solo, plan.name, bound)
        assert learns(losses[plan.name])


def test_divergence_and_an_early_stop_touch_nobody_else():
    wild = Plan("wild", inlay.LoRA(r=2), lr=1e300, batch_size=4, steps=20)
    short = Plan("short", inlay.IA3(), lr=1e-2, batch_size=4, steps=20, stop_after=7)
    bank, _, contenders = run("llama", [wild, PLANS[0], short, PLANS[2]])
    assert contenders["wild"].stopped.startswith("diverged") and contenders["wild"].step < 20
    assert contenders["short"].stopped == "stopped early" and contenders["short"].step == 7
    for plan in (PLANS[0], short, PLANS[2]):
        solo, _, _ = run("llama", [plan])
        same(bank, solo, plan.name, 1e-8)


def test_small_forwards_give_the_same_gradients():
    bank, losses, _ = run("llama", PLANS)
    small, again, _ = run("llama", PLANS, tokens_at_once=10)
    for plan in PLANS:
        torch.testing.assert_close(losses[plan.name], again[plan.name], rtol=1e-8, atol=1e-8)
        same(bank, small, plan.name, 1e-8)


def test_dropout_does_something_and_none_of_it_is_left_afterwards():
    _, with_dropout, _ = run("llama", [PLANS[0]])
    _, without, _ = run("llama", [Plan("lora", inlay.LoRA(r=4), lr=1e-2, batch_size=3, steps=20, seed=1)])
    assert with_dropout["lora"][0] == without["lora"][0]  # the branch starts at zero
    assert with_dropout["lora"][5] != without["lora"][5]


def test_an_encoder_decoder_and_a_recurrent_base_train_on_padded_rows():
    for name in ("t5", "mamba"):
        _, losses, contenders = run(name, [PLANS[0]])
        assert contenders["lora"].step == 20 and learns(losses["lora"])


def test_a_base_that_writes_no_text_is_refused():
    with pytest.raises(UsageError, match="write text"):
        run("vit", PLANS[:1])


def test_one_step_is_the_reference_step():
    """Loss and gradient against plain transformers and AdamW on one row."""
    row = examples(1)
    bank = inlay.attach(make("llama"))
    plan = Plan("a", inlay.LoRA(r=4), lr=1e-2, batch_size=1, steps=1, clip=1e9)
    seen = []
    train(bank, [plan], row, on_step=lambda cs: seen.append(cs[0].loss))
    model = make("llama")
    ids = torch.tensor([row[0].ids])
    labels = torch.tensor([[t if learned else -100 for t, learned in zip(row[0].ids, row[0].learned, strict=True)]])
    torch.testing.assert_close(seen[0], float(model(input_ids=ids, labels=labels).loss.detach()), rtol=1e-6, atol=1e-6)
