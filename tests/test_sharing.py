"""Rows share what they have read where their adapters are equal, as they are now; what differs is not even hashed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.runtime import sharing
from inlay.runtime.generating import Session, generate
from inlay.runtime.memory import TokenBudget
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from zoo import make

COMMON = [*range(6, 46)]
NEW = Sampling(max_new_tokens=3, ignore_eos=True, logprobs=1)
ROWS = [Example(tuple(COMMON[n : n + 9]), (False,) * 4 + (True,) * 5, n) for n in range(8)]


@pytest.fixture
def bank():
    bank = inlay.attach(make("llama"))
    torch.manual_seed(1)
    for name, seed in (("a", 1), ("b", 2)):
        bank.add(name, inlay.LoRA(r=2), seed=seed)
        with torch.no_grad():
            for value in bank.parameters(name):
                value.add_(torch.randn_like(value) * 0.3)
    return bank


@pytest.fixture
def hashed(monkeypatch):
    """Adapters whose values were all hashed."""
    seen, usual = [], sharing._digest

    def digest(adapter):
        seen.append(adapter.name)
        return usual(adapter)

    monkeypatch.setattr(sharing, "_digest", digest)
    return seen


def twice(bank, folder):
    """The adapter "a" under two more names."""
    bank.save("a", folder)
    for name in ("one", "two"):
        bank.load(name, folder)


def asked(session, name, last=5):
    """The answer to the common prompt: the log probabilities of its tokens, and how much of it was read before."""
    session.add(0, Request(name, [*COMMON, last], NEW))
    tokens = []
    while session.busy:
        tokens += session.step()
    return [token.logprobs.chosen for token in tokens], tokens[0].cached


def fresh(bank, name):
    """The same in a session of its own."""
    return asked(Session(bank, store=2**24), name)[0]


def stepped(bank, name, learners=None):
    """Take one step of training; returns the learners, to go on with."""
    plan = Plan(name, bank.adapters[name].method, batch_size=4, steps=9, lr=0.05, schedule="constant")
    learners = learners or add_learners(bank, [plan], len(ROWS), bank.adapters, examples=ROWS)
    next(train_steps(bank, learners, ROWS, TokenBudget(4096)))
    return learners


# ---- what is not hashed


def test_rows_of_one_adapter_share_and_hash_nothing(bank, hashed):
    session = Session(bank, store=2**24)
    assert asked(session, "a")[1] == 0 and asked(session, "a", 7)[1] > 0
    assert hashed == []


def test_different_adapters_with_one_prompt_hash_nothing_and_share_nothing(bank, hashed):
    session = Session(bank, store=2**24)
    answers = {name: asked(session, name) for name in ("a", "b", None)}
    assert all(cached == 0 for _, cached in answers.values()) and hashed == []
    assert answers["a"][0] != answers["b"][0] != answers[None][0]
    assert all(own == pytest.approx(fresh(bank, name)) for name, (own, _) in answers.items())


def test_equal_adapters_are_one_and_are_hashed_once(bank, hashed, tmp_path):
    twice(bank, tmp_path / "a")
    session = Session(bank, store=2**24)
    first, second = asked(session, "one"), asked(session, "two")
    assert second[1] > 0 and first[0] == pytest.approx(second[0])
    asked(session, "two", 9)
    assert sorted(hashed) == ["one", "two"]


def test_those_that_differ_where_no_sample_looks_are_told_apart(bank, hashed, tmp_path):
    twice(bank, tmp_path / "a")
    with torch.no_grad():
        [*bank.parameters("two")][4].flatten()[0].add_(1.0)
    session = Session(bank, store=2**24)
    assert asked(session, "one")[1] == asked(session, "two")[1] == 0
    assert sorted(hashed) == ["one", "two"]


def test_weights_and_scopes_stay_apart(bank):
    session = Session(bank, store=2**24)
    cached = [asked(session, row)[1] > 0 for row in ("a", {"a": 0.5}, ["a", "b"], ["b", "a"], {"a": 0.5})]
    assert cached == [False, False, False, False, True]


# ---- adapters that change


def test_a_step_between_two_calls_is_seen_by_the_second(bank):
    def answers():
        requests = [Request("a", [*COMMON, last], NEW) for last in (5, 7)]
        found = {}
        for token in generate(bank, requests):
            assert token.logprobs is not None
            found.setdefault(token.request, []).append(token.logprobs.chosen)
        return found

    before = answers()
    learners = stepped(bank, "a")
    after = answers()
    assert after[0] != pytest.approx(before[0]) and after[1] != pytest.approx(before[1])
    assert after[0] == pytest.approx(fresh(bank, "a"))
    stepped(bank, "a", learners)
    assert answers()[0] == pytest.approx(fresh(bank, "a")) != pytest.approx(after[0])


@pytest.mark.parametrize("method", [inlay.LoRA(r=2), inlay.PrefixTuning(3), inlay.IA3()])
def test_a_step_within_a_session_leaves_nothing_of_the_old_values(bank, method):
    bank.add("c", method, seed=3)
    learners = stepped(bank, "c")
    session = Session(bank, store=2**24)
    first = asked(session, "c")
    stepped(bank, "c", learners)
    second = asked(session, "c")
    assert second[1] == 0 and second[0] == pytest.approx(fresh(bank, "c")) != pytest.approx(first[0])
    assert asked(session, "c", 7)[1] > 0  # rows of the new values share again


def test_a_fusion_changes_with_what_it_is_over(bank):
    for name in ("one", "two"):
        bank.add(name, inlay.Pfeiffer(reduction_factor=4), seed=1)
    bank.add("f", inlay.Fusion(adapters=["one", "two"]), seed=1)
    session = Session(bank, store=2**24)
    first = asked(session, "f")
    assert asked(session, "f", 7)[1] > 0
    with torch.no_grad():
        for value in bank.parameters("two"):
            value.add_(0.5)
    second = asked(session, "f")
    assert second[1] == 0 and second[0] == pytest.approx(fresh(bank, "f")) != pytest.approx(first[0])


# ---- adapters that go


def test_one_that_is_loaded_again_finds_what_was_read_and_holds_no_memory(bank, tmp_path):
    bank.save("a", tmp_path / "a")
    bank.load("a2", tmp_path / "a")
    session = Session(bank, store=2**24)
    first = asked(session, "a2")
    bank.remove("a2")
    session.decoder.forget()
    assert not {adapter.name for adapter in session.decoder.names._contents} & {"a2"}
    bank.load("a2", tmp_path / "a")
    second = asked(session, "a2")
    assert second[1] > 0 and second[0] == pytest.approx(first[0])


def test_values_that_changed_before_it_went_are_not_taken_for_those_that_were_read(bank, tmp_path):
    """What was read is of the old values; an adapter of the new ones must not find it."""
    session = Session(bank, store=2**24)
    asked(session, "a")
    with torch.no_grad():
        [*bank.parameters("a")][4].add_(1.0)
    bank.save("a", tmp_path / "new")
    bank.remove("a")
    session.decoder.forget()
    bank.load("a", tmp_path / "new")
    answer = asked(session, "a")
    assert answer[1] == 0 and answer[0] == pytest.approx(fresh(bank, "a"))


def test_a_change_that_torch_does_not_count_is_seen_wherever_it_is(bank):
    session = Session(bank, store=2**24)
    asked(session, "a")
    value = [*bank.parameters("a")][1]
    middle = value.data.view(-1)[value.numel() // 2 :][:1]
    counted = value._version
    middle += 3
    assert value._version == counted
    changed, cached = asked(session, "a")
    assert cached == 0
    assert changed == fresh(bank, "a")


def test_nothing_read_with_the_base_before_a_merge_is_used_behind_it(bank):
    session = Session(bank, store=2**24)
    before = asked(session, None)[0]
    session.add(1, Request(None, COMMON, NEW))
    with pytest.raises(UsageError, match="in flight"):
        bank.merge("a")
    session.close()
    bank.merge("a")
    behind, cached = asked(session, None)
    assert cached == 0 and behind != before
    assert behind == fresh(bank, None)


def test_a_removed_adapter_is_let_go_of_at_once(bank):
    session = Session(bank, store=2**24)
    asked(session, "a")
    known = weakref.ref(bank.adapters["a"])
    gc.disable()
    try:
        bank.remove("a")
        session.decoder.forget()
        assert known() is None
    finally:
        gc.enable()
