"""Contenders trained together equal their solo runs, whatever becomes of the others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.runs.fitting import fit_of
from inlay.runs.run import run as whole_run
from inlay.runs.settings import Settings
from inlay.runtime.forward import Segment, token_losses
from inlay.runtime.memory import TokenBudget
from inlay.sites.positions import positions_of, table_size
from inlay.training.loop import add_learners, train, train_steps
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


def run(name, plans, dtype=torch.float64, tokens_at_once=4096):
    bank = inlay.attach(make(name, dtype=dtype))
    losses = {plan.name: [] for plan in plans}

    learners = add_learners(bank, plans, 24)
    for stepped in train_steps(bank, learners, examples(), TokenBudget(tokens_at_once)):
        for learner in stepped:
            if not learner.diverged:
                losses[learner.plan.name].append(learner.loss)
    return bank, losses, {c.plan.name: c for c in learners}


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
    bank, losses, learners = run(name, PLANS, dtype)
    for plan in PLANS:
        solo, alone, _ = run(name, [plan], dtype)
        assert learners[plan.name].step == 20 and len(losses[plan.name]) == 20
        torch.testing.assert_close(losses[plan.name], alone[plan.name], rtol=bound, atol=bound)
        same(bank, solo, plan.name, bound)
        assert learns(losses[plan.name])


@pytest.mark.parametrize("lr", [1e300, 1e38])
def test_divergence_and_an_early_stop_touch_nobody_else(lr):
    wild = Plan("wild", inlay.LoRA(r=2), lr=lr, batch_size=4, steps=20)
    short = Plan("short", inlay.IA3(), lr=1e-2, batch_size=4, steps=20, stop_after=7)
    bank, _, learners = run("llama", [wild, PLANS[0], short, PLANS[2]])
    assert learners["wild"].stopped.startswith("diverged") and learners["wild"].step < 20
    assert learners["short"].stopped == "stopped early" and learners["short"].step == 7
    for plan in (PLANS[0], short, PLANS[2]):
        solo, _, _ = run("llama", [plan])
        same(bank, solo, plan.name, 1e-8)


def outcome(steps=1, spoil=None, **settings):
    """A learner beside a calm one, and the losses that its adapter gives when both have ended."""
    plans = [Plan("a", inlay.LoRA(r=2), batch_size=4, steps=steps, **settings), replace(PLANS[0], steps=3)]
    bank = inlay.attach(make("llama", dtype=torch.float32))
    learners = add_learners(bank, plans, 24)
    if spoil is not None:
        spoil(learners[0])
    start = learners[0].weights()
    for _ in train_steps(bank, learners, examples(), TokenBudget(4096)):
        pass
    with torch.no_grad(), learners[0].averaged_weights():
        losses = token_losses(bank, [Segment("a", example) for example in examples()])
        kept = learners[0].weights()
    return learners, start, kept, torch.cat(losses), bank


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "schedule-free", "adamw-8bit"])
@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_an_absurd_update_is_divergence_and_is_taken_back(lr, optimizer, steps):
    learners, start, kept, losses, bank = outcome(steps, lr=lr, optimizer=optimizer, schedule="constant", clip=1e9)
    assert learners[0].diverged and learners[0].cause and learners[0].sound == 0
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert bool(losses.isfinite().all())
    calm, _, _ = run("llama", [replace(PLANS[0], steps=3)], torch.float32)
    assert learners[1].stopped == "done"
    same(bank, calm, "lora", 2e-3)


def test_an_optimizer_whose_state_is_no_number_is_divergence():
    def spoil(learner):
        def after(*_):
            if learner.step == 1:
                for state in learner.optimizer.state.values():
                    state["exp_avg"].fill_(torch.nan)

        learner.optimizer.register_step_post_hook(after)

    learners, start, kept, losses, _ = outcome(5, spoil, lr=1e-2)
    assert learners[0].stopped == "diverged at step 3" and learners[0].sound == 2
    assert bool(losses.isfinite().all()) and any(not torch.equal(kept[name], start[name]) for name in start)


@pytest.mark.parametrize("steps", [2, 5])
def test_what_is_kept_has_only_given_losses_that_are_numbers(steps):
    """The update of step 2 is finite and ruins the adapter, which step 3 finds out, or a look at the end."""

    def spoil(learner):
        def after(*_):
            if learner.step == 1:
                for parameter in learner.parameters:
                    parameter.data.fill_(1e17)
            else:
                learner.after = [p.detach().clone() for p in learner.parameters]

        learner.optimizer.register_step_post_hook(after)

    learners, _, _, losses, _ = outcome(steps, spoil, lr=1e-2)
    assert learners[0].stopped == f"diverged at step {min(steps, 3)}" and learners[0].sound == 1
    assert bool(losses.isfinite().all())
    kept = [p.detach() for p in learners[0].parameters]
    assert all(torch.equal(one, other) for one, other in zip(kept, learners[0].after, strict=True))


def test_an_ordinary_end_is_no_divergence_and_changes_nothing():
    learners, *_ = outcome(3, lr=1e-2)
    assert learners[0].stopped == "done" and learners[0].sound == learners[0].step == 3


def test_the_rate_is_that_of_the_step_it_was_used_in():
    bank = inlay.attach(make("llama"))
    plan = Plan("a", inlay.LoRA(r=2), lr=1.0, batch_size=4, steps=4, warmup=0.5, schedule="linear", clip=1e-9)
    learners = add_learners(bank, [plan], 24)
    seen = [stepped[0].rate for stepped in train_steps(bank, learners, examples(), TokenBudget(4096))]
    assert seen == [0.0, 0.5, 1.0, 0.5]


def test_the_order_of_a_pass_is_drawn_once(monkeypatch):
    drawn, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: drawn.append(n) or real(n, **more))
    bank = inlay.attach(make("llama"))
    plan = Plan("a", inlay.LoRA(r=2), lr=1e-2, batch_size=5, epochs=3, seed=7)
    batches = []
    learner = add_learners(bank, [plan], 24)[0]
    for step in range(15):
        learner.step = step
        batches.append([example.sample for example in learner.batch(examples())])
    assert drawn == [24, 24, 24]
    for epoch in range(3):
        order = real(24, generator=torch.Generator().manual_seed(7 * 1_000_003 + epoch)).tolist()
        assert [sample for batch in batches[5 * epoch : 5 * epoch + 5] for sample in batch] == order


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
        _, losses, learners = run(name, [PLANS[0]])
        assert learners["lora"].step == 20 and learns(losses["lora"])


def test_a_base_that_writes_no_text_is_refused():
    with pytest.raises(UsageError, match="write text"):
        run("vit", PLANS[:1])


def test_one_step_is_the_reference_step():
    """Loss and gradient against plain transformers and AdamW on one row."""
    row = examples(1)
    bank = inlay.attach(make("llama"))
    plan = Plan("a", inlay.LoRA(r=4), lr=1e-2, batch_size=1, steps=1, clip=1e9)
    seen = [learner.loss for learner in train(bank, [plan], row)]
    model = make("llama")
    ids = torch.tensor([row[0].ids])
    labels = torch.tensor([[t if learned else -100 for t, learned in zip(row[0].ids, row[0].loss_mask, strict=True)]])
    torch.testing.assert_close(seen[0], float(model(input_ids=ids, labels=labels).loss.detach()), rtol=1e-6, atol=1e-6)


# ---- how long a row may be


def bare(config, kind, **settings):
    import transformers as tf

    given = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 90,
    }
    return getattr(tf, kind)(getattr(tf, config)(**{**given, **settings}))


@pytest.mark.parametrize(
    ("config", "kind", "settings", "positions"),
    [
        ("RobertaConfig", "RobertaForCausalLM", {"is_decoder": True, "max_position_embeddings": 514}, 512),
        ("BertConfig", "BertLMHeadModel", {"is_decoder": True}, 512),
        ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}, 2048),
        ("GPT2Config", "GPT2LMHeadModel", {"n_positions": 77}, 77),
        ("LlamaConfig", "LlamaForCausalLM", {"max_position_embeddings": 99}, 99),
        ("BloomConfig", "BloomForCausalLM", {}, None),
        ("MambaConfig", "MambaForCausalLM", {}, None),
    ],
)
def test_positions_are_read_off_the_base(config, kind, settings, positions):
    model = bare(config, kind, **settings)
    assert positions_of(model) == positions and table_size(model) == 90
    if positions is not None and config != "LlamaConfig":  # as many tokens run, and one more does not
        ids = torch.full((1, positions), 5)
        model(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_virtual_tokens_take_positions_and_must_leave_some():
    model = bare("LlamaConfig", "LlamaForCausalLM", max_position_embeddings=64)
    assert fit_of(model, inlay.LoRA(), 512).max_length == 64 and fit_of(model, inlay.LoRA(), 50).max_length == 50
    prefix = inlay.PrefixTuning(num_virtual_tokens=40)
    assert fit_of(model, prefix, 512).max_length == 24
    assert "rows are cut" in fit_of(model, prefix, 512).notice({"cut": 3}, "it")
    assert (
        fit_of(model, prefix, 512).notice({"cut": 0}, "it") == fit_of(model, prefix, 20).notice({"cut": 3}, "it") == ""
    )
    with pytest.raises(UsageError, match=r"50 virtual tokens leave 14 of the base's 64 positions.*Use 48 or fewer"):
        fit_of(model, inlay.PrefixTuning(num_virtual_tokens=50), 512)


def test_rows_longer_than_the_base_are_cut_and_that_is_said(base_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{n} a good film " * 40, "completion": " answer"} for n in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    said = []
    given = Settings(base=str(base_folder), data=[str(data)], out=str(tmp_path / "run"), steps=1, method="prompt")
    whole_run(given, on_message=said.append)
    line = next(line for line in said if "positions" in line or "room for" in line)
    notes = json.loads((tmp_path / "run" / "adapter" / "inlay.json").read_text())
    story = json.loads((tmp_path / "run" / "run.json").read_text())
    assert notes["max_length"] == story["max_length"] == 128 - story["cost"]["virtual_tokens"]
    assert "11 rows are cut" in line and line in story["notices"] and story["data"]["lengths"]["longest"] <= 128
