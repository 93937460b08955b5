"""Running out of memory changes how a step is computed, not what it computes."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
import inlay.evaluation.score
import inlay.training.loop
from inlay.data.encode import Encoder
from inlay.data.table import Row
from inlay.data.template import Template
from inlay.errors import InlayError, UsageError
from inlay.evaluation.score import score_rows
from inlay.methods.table import METHODS
from inlay.runs.peaks import Peaks, why_otherwise
from inlay.runs.run import run
from inlay.runtime.held import held_bytes
from inlay.runtime.memory import TokenBudget, current_memory_mb, parse_size
from inlay.training.loop import add_learners, train, train_steps
from inlay.training.plan import Plan
from test_crash import reviews, settings  # noqa: F401
from test_training import PLANS, examples
from zoo import ALONE, FITTING, REFUSED, make


class Scarce:
    """A forward that runs out of memory above some tokens."""

    def __init__(self, monkeypatch, module, name, tokens, error=MemoryError):
        real, self.failures = getattr(module, name), 0

        def limited(bank, segments, *rest):
            out = real(bank, segments, *rest)
            if sum(len(s.example.ids) for s in segments) > tokens:
                self.failures += 1
                raise error
            return out

        monkeypatch.setattr(module, name, limited)


def gradients(plans, budget):
    """Gradients of the first step, caught before the optimizer uses them, and the parameters after three."""
    bank = inlay.attach(make("llama"))
    learners = add_learners(bank, plans, 24)
    caught = {}

    for learner in learners:
        real = learner.update

        def update(*given, real=real, learner=learner):
            caught.setdefault(learner.plan.name, [p.grad.clone() for p in learner.parameters])
            return real(*given)

        learner.update = update
    for _ in train_steps(bank, learners, examples(), budget):
        pass
    return caught, {plan.name: list(bank.parameters(plan.name)) for plan in plans}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB")])
def test_a_step_that_runs_out_of_memory_is_redone_with_the_same_gradients(error, monkeypatch):
    plans = [Plan(p.name, p.method, lr=p.lr, batch_size=p.batch_size, steps=3, seed=p.seed) for p in PLANS]
    plain, ended = gradients(plans, TokenBudget(4096))
    scarce = Scarce(monkeypatch, inlay.runtime.tasks, "token_losses", 20, error)
    said = []
    budget = TokenBudget(4096, on_message=said.append)
    again, redone = gradients(plans, budget)
    assert scarce.failures >= 1 and budget.tokens <= 20
    assert len(said) == len(budget.backed_off) == scarce.failures and "out of memory" in said[0]
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(redone[name], ended[name], rtol=1e-7, atol=1e-9)


def test_other_errors_are_not_taken_for_it(monkeypatch):
    Scarce(monkeypatch, inlay.runtime.tasks, "token_losses", 20, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        gradients(PLANS, TokenBudget(4096))


def test_one_row_that_does_not_fit_ends_in_a_clear_error(monkeypatch):
    Scarce(monkeypatch, inlay.runtime.tasks, "token_losses", 2)
    with pytest.raises(InlayError, match=r"one row of \d+ tokens does not fit.*--gradient-checkpointing"):
        gradients(PLANS, TokenBudget(4096))


def test_the_limit_cuts_forwards_before_memory_runs_out(monkeypatch):
    plain, _ = gradients(PLANS[:1], TokenBudget(4096))
    seen = []

    def pretended(device=None):
        seen.append(budget.largest[0])
        return 50.0 * budget.largest[0]

    monkeypatch.setattr("inlay.runtime.memory.current_memory_mb", pretended)
    budget = TokenBudget(4096, limit_mb=600.0)
    again, _ = gradients(PLANS[:1], budget)
    assert budget.backed_off and "near the memory limit of 600 MB" in budget.backed_off[0]["why"]
    assert max(seen) * 50 > 580 and seen[-1] * 50 <= 600
    torch.testing.assert_close(again["lora"], plain["lora"], rtol=1e-9, atol=1e-12)


def test_evaluation_has_a_back_off_of_its_own(tokenizer, base_folder, monkeypatch):
    import transformers as tf

    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    bank.add("a", inlay.LoRA(r=2), seed=0)
    template = Template("label", "Review: {text}\nSentiment:", "label", {"0": ["negative"], "1": ["positive"]})
    encoder = Encoder(tokenizer, template, 64)
    rows = [Row({"text": f"a film, number {n}", "label": str(n % 2)}, n, "f", n) for n in range(10)]
    plain = score_rows(bank, encoder, rows, [None, "a"], TokenBudget(4096))
    scarce = Scarce(monkeypatch, inlay.evaluation.score, "answer_logits", 120)
    budget = TokenBudget(4096)
    again = score_rows(bank, encoder, rows, [None, "a"], budget)
    assert scarce.failures >= 1 and budget.tokens < 4096
    for name, scored in plain.items():
        assert again[name].confusion == scored.confusion
        assert again[name].scores == pytest.approx(scored.scores, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe", "t5"])
@pytest.mark.parametrize("method", ALONE)
def test_gradient_checkpointing_trains_every_method_the_same(method, name):
    settings = {"dropout": 0.2} if method == "lora" else FITTING.get(method, {})
    if method in REFUSED.get(name, ()):
        with pytest.raises(UsageError, match="a base of one stack"):
            inlay.attach(make(name)).add("a", METHODS[method](**settings))
        return
    plan = Plan("a", METHODS[method](**settings), lr=1e-2, batch_size=4, steps=3, seed=1)
    ends, calls = [], [0, 0]
    for recompute in (False, True):
        bank = inlay.attach(make(name))
        watched = [*bank.base.attentions][-1]

        def count(*_, recompute=recompute):
            calls[recompute] += torch.is_grad_enabled()

        watched.register_forward_hook(count)
        train(bank, [plan], examples(), recompute=recompute)
        ends.append(list(bank.parameters("a")))
        assert not any(module.training for module in bank.model.modules())
    assert calls[1] == (1 if method == "head" else 2) * calls[0]  # nothing before a head is trained
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)


def test_checkpointing_keeps_less_and_the_estimate_counts_it():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.LoRA(r=2), seed=0)
    ids = torch.arange(3, 40)[None]

    def kept():
        with bank.route(["a"]):
            return held_bytes(bank.model.parameters(), lambda: bank.model(input_ids=ids, use_cache=False).logits).saved

    kept()
    plain = kept()
    with bank.recomputing():
        assert kept() < plain / 2
    assert kept() == pytest.approx(plain, rel=0.05)


def test_sizes_are_read():
    assert parse_size("4GB") == 4096 and parse_size("900 MB") == 900 and parse_size("1.5GiB") == 1536
    assert parse_size("none") is None and parse_size(None) is None
    assert parse_size("auto") > current_memory_mb()
    for text in ("much", "4 parsecs", "0GB", "-1GB", "", "1048576"):
        with pytest.raises(UsageError, match="4GB"):
            parse_size(text)


def peaks(highest, part, tokens=900):
    found = Peaks(torch.device("cpu"))
    found.highest, found.part, found.tokens = highest, part, tokens
    return found


@pytest.mark.parametrize(
    ("highest", "part", "more", "said"),
    [
        (1100, "steps", {}, ""),
        (900, "steps", {}, ""),
        (1300, "loading", {}, "while the base was loaded"),
        (1300, "scoring", {}, "scoring the held-out rows"),
        (1300, "steps", {}, "compiled kernels"),
        (700, "steps", {"backed_off": [{"to": 50}]}, "cut to 50 tokens at once"),
        (700, "steps", {}, "a step of the longest rows, 1000 tokens; the largest had 900"),
        (700, "steps", {"step_tokens": 910}, "kept less"),
    ],
)
def test_a_peak_far_from_the_estimate_is_explained(highest, part, more, said):
    memory = {"estimate_mb": 1000.0, "tokens_at_once": 50, "step_tokens": 1000, "backed_off": [], **more}
    why = why_otherwise(peaks(highest, part), memory)
    assert (said in why and why.endswith(".")) if said else why == ""


def test_the_part_that_raised_the_peak_last_is_remembered(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("inlay.runs.peaks.peak_memory_mb", lambda: now[0])
    found = Peaks(torch.device("cpu"))
    for part, peak, tokens in (("loading", 100, 0), ("steps", 150, 7), ("scoring", 150, 0), ("steps", 150, 5)):
        now[0] = peak
        found.note(part, tokens)
    assert (found.highest, found.part, found.tokens) == (150, "steps", 7)
    now[0] = 200
    found.note("scoring")
    assert found.part == "scoring"


def test_a_run_says_why_its_peak_was_another(base_folder, reviews, tmp_path):  # noqa: F811
    run(settings(base_folder, reviews, tmp_path / "run"), on_message=lambda line: None)
    memory = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]
    assert memory["step_tokens"] > 0 and isinstance(memory["why"], str)
