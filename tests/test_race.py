"""Races: who stays is a function of scores alone, each contender equals its solo run, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import inlay
from inlay.bases.load import load_base
from inlay.errors import UsageError
from inlay.methods.table import METHODS
from inlay.race import latency
from inlay.race.halving import Halving, teams_of
from inlay.race.race import race
from inlay.race.rungs import choices, kept, rungs_of, scored, shares_for, work
from inlay.race.settings import RaceSettings, parse_budget
from inlay.runs.asking import Ask, Requests
from inlay.runs.best import BestCheckpoint
from inlay.runs.events import Events, read_events
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import dying_at, forked, reviews  # noqa: F401
from test_laws import WISHES
from test_training import examples, same
from zoo import make

SPACE = """
entries:
  - {method: lora, r: [2, 4], lr: [1.0e-2, 1.0e-3]}
  - {method: ia3, lr: [3.0e-2]}
  - {method: prompt, num_virtual_tokens: 3, lr: [1.0e-2]}
"""


NINTHS = choices(9)[0]


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def latency_of_few(monkeypatch):
    """Time what those add that finished, and nobody else: tests of latency are elsewhere."""
    monkeypatch.setattr(latency, "LEAST", 0.0)
    monkeypatch.setattr(latency, "SHARE", 0.0)


# ---- rungs


def test_a_third_goes_on_at_each_rung():
    ninths, thirds = choices(16)
    assert ninths == pytest.approx((1 / 9, 1 / 3, 1)) and thirds == pytest.approx((1 / 3, 1)) and len(choices(3)) == 1
    assert [kept(n) for n in (1, 2, 3, 4, 16, 6)] == [1, 1, 1, 2, 6, 2]
    assert scored(16, ninths) == [16, 6, 2] and rungs_of(90, ninths) == (10, 30, 90)
    assert work(16, ninths) == pytest.approx(16 / 9 + 6 * (1 / 3 - 1 / 9) + 2 * (2 / 3))
    assert work(16, ninths) < 16 / 3


def test_short_courses_have_fewer_rungs():
    assert shares_for(16, 90) == choices(16)[0] and shares_for(16, 9) == choices(16)[1]
    assert shares_for(16, 4) is None and shares_for(2, 5) == choices(2)[0]


@pytest.mark.parametrize(("text", "tokens", "seconds"), [
    ("20m", None, 1200), ("90s", None, 90), ("1.5h", None, 5400), ("2M", 2_000_000, None), ("500k", 500_000, None),
    ("300000", 300_000, None),
])  # fmt: skip
def test_budgets_are_time_or_tokens(text, tokens, seconds):
    found = parse_budget(text)
    assert (found.tokens, found.seconds) == (tokens, seconds)


@pytest.mark.parametrize("text", ["", "0", "0m", "20 parsecs", "-3M", "m"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match="cannot be read"):
        parse_budget(text)


# ---- who stays


def contender(name, step, losses, total=90, stopped="", r=2, seed=0):
    """A contender of 12 choosing rows, whose scores after rungs are `losses`; the rows differ by what `losses` do."""
    plan = Plan(name, inlay.LoRA(r=r), steps=total, seed=seed)
    best = BestCheckpoint("loss", keeps_rows=True)
    for at, loss in zip(rungs_of(total, NINTHS), losses, strict=False):
        spread = torch.linspace(-0.01, 0.01, 12, dtype=torch.float64)
        best.scores.append({"step": at, "loss": loss})
        best.rows.append(torch.stack([loss + spread, torch.ones(12), torch.ones(12)]).double())
    learner = SimpleNamespace(
        plan=plan, step=step, total=total, live=not stopped, stopped=stopped, diverged=stopped.startswith("diverged")
    )
    return SimpleNamespace(name=name, learner=learner, best=best, kept=False)


def test_at_the_first_rung_the_best_third_stays():
    rule, losses = Halving(NINTHS), [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6]
    field = [contender(f"c{n}", 10, [loss], r=n + 1) for n, loss in enumerate(losses)]
    chosen = rule.select(field, [])
    assert {*chosen.stop} == {"c0", "c2", "c4", "c6", "c7", "c8"} and chosen.stop["c2"] == (
        "dropped at rung 1: place 9 of 9"
    )
    assert not rule.select([*reversed(field)], []).stop.keys() - chosen.stop.keys()  # whatever their order
    between = [contender(f"c{n}", 11, [loss], r=n + 1) for n, loss in enumerate(losses)]
    assert not rule.select(between, []).stop  # nobody leaves between rungs


def test_later_it_leaves_that_is_worse_beyond_chance_and_those_that_left_count():
    rule = Halving(NINTHS)
    field = [contender("a", 30, [0.1, 0.1], r=1), contender("b", 30, [0.1, 0.1], r=2),
             contender("c", 30, [0.2, 0.3], r=3), contender("d", 30, [0.2, 0.31], r=4),
             contender("e", 10, [0.9], r=5, stopped="dropped at rung 1: place 9 of 9")]  # fmt: skip
    assert [*rule.select(field, []).stop] == ["c", "d"]
    close = [contender("a", 30, [0.1, 0.1], r=1), contender("b", 30, [0.1, 0.2], r=2)]
    assert rule.select(close, []).stop == {"b": "dropped at rung 2: place 2 of 2"}
    many = [contender(f"m{n}", 30, [0.1, 0.1 + n / 100], r=n + 1) for n in range(4)]
    assert rule.select(many, []).stop["m1"] == "dropped at rung 2: worse than m0 beyond chance"


def test_one_that_comes_late_is_compared_with_all_that_came_before():
    rule = Halving(NINTHS)
    gone = [contender(f"g{n}", 10, [0.5 + n / 10], r=n + 1, stopped="dropped at rung 1") for n in range(5)]
    ahead = contender("ahead", 25, [0.2], r=8)
    assert not rule.select([*gone, ahead, contender("late", 10, [0.3], r=9)], []).stop
    assert [*rule.select([*gone, ahead, contender("late", 10, [0.8], r=9)], []).stop] == ["late"]


def test_twins_leave_together_by_their_mean_and_wait_for_one_another():
    rule = Halving(choices(3)[0])
    early = [contender("a-s0", 30, [0.1, 0.1], r=1), contender("a-s1", 30, [0.9, 0.9], r=1, seed=1)]
    other = [contender("b-s0", 30, [0.3, 0.3], r=2), contender("b-s1", 30, [0.3, 0.3], r=2, seed=1)]
    third = [contender("c-s0", 30, [0.8, 0.8], r=3), contender("c-s1", 30, [0.8, 0.8], r=3, seed=1)]
    assert teams_of([own.learner.plan for own in (*early, *other, *third)]) == 3
    assert {*rule.select([*early, *other, *third], []).stop} == {"a-s0", "a-s1", "c-s0", "c-s1"}


def test_those_that_left_make_room():
    rule, plans = Halving(NINTHS, at_once=2), [Plan(f"p{n}", inlay.LoRA(r=n + 1)) for n in range(4)]
    assert rule.select([], plans).start == ["p0", "p1"]
    field = [contender("p0", 5, [], r=1), contender("p1", 5, [], r=2, stopped="diverged at step 5")]
    assert rule.select(field, plans[2:]).start == ["p2"]


# ---- each equals its solo run

RACED = [*METHODS]
OVER = {"first": inlay.Pfeiffer(reduction_factor=4), "second": inlay.Houlsby(reduction_factor=8)}
"""Adapters that are there already, of which a fusion is made."""
NEEDS = {"fusion": inlay.Fusion(adapters=[*OVER]), "alora": inlay.ALoRA(r=2, alora_invocation_tokens=[35])}
"""Methods whose usual wish is of another bank, or acts behind a token that these rows do not have."""


def attached():
    """A bank with the adapters that a fusion is over, as if they were trained."""
    bank = inlay.attach(make("llama"))
    for name, method in OVER.items():
        bank.add(name, method, seed=9)
        with torch.no_grad():
            for number, p in enumerate(bank.parameters(name)):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    return bank


def made(name):
    """A plan of each method: with dropout where it has one, and a rate, a batch and a seed of its own."""
    number = RACED.index(name)
    wishes = [NEEDS[name]] if name in NEEDS else [wish() for wish in WISHES.values()]
    method = next((wish for wish in wishes if type(wish) is METHODS[name]), None) or METHODS[name]()
    if hasattr(method, "dropout"):
        method = replace(method, dropout=0.1)
    return Plan(name, method, batch_size=2 + number % 3, steps=4 + number % 3, seed=number, lr=3 * method.usual_rate)


@pytest.mark.parametrize("part", range(-(-len(RACED) // 9)))
def test_each_method_in_a_race_of_twelve_equals_its_solo_run(part):
    """Nine methods, one that is dropped, one that diverges and one that enters late."""
    learners = raced_and_alone([made(name) for name in RACED[9 * part : 9 * part + 9]], attached)
    assert any(learner.diverged for learner in learners)


def raced_and_alone(plans, attach):
    """Train the plans with three more in one stream, and each in one of its own; `attach` gives a new bank."""
    dropped = Plan("gone", inlay.LoRA(r=3), batch_size=3, steps=9, seed=77)
    wild = Plan("wild", inlay.LoRA(r=2), lr=1e30, batch_size=2, steps=9, seed=78, schedule="constant", warmup=0.3)
    late = Plan("late", inlay.IA3(), batch_size=2, steps=3, seed=79)
    bank, before = attach(), attach()
    learners = add_learners(bank, [*plans, dropped, wild], 24, examples=examples())
    for turn, _ in enumerate(train_steps(bank, learners, examples(), TokenBudget(4096))):
        if turn == 1:
            learners[len(plans)].stop("dropped")
            learners += add_learners(bank, [late], 24, examples=examples())
    for name in before.adapters:  # what a fusion is over is not trained
        assert all(map(torch.equal, bank.parameters(name), before.parameters(name)))
    for plan in [*plans, late]:
        solo = attach()
        fresh = [p.clone() for p in add_learners(solo, [plan], 24, examples=examples())[0].adapter.parameters()]
        solo.remove(plan.name)
        for _ in train_steps(solo, add_learners(solo, [plan], 24, examples=examples()), examples(), TokenBudget(4096)):
            pass
        assert not all(map(torch.equal, fresh, solo.parameters(plan.name))), plan.name
        same(bank, solo, plan.name, 1e-8)
    return learners


def test_merged_lora_on_fused_weights_equals_its_solo_run():
    method = inlay.MergedLoRA(r=2, enable_lora=[True, False, True], dropout=0.1)
    plans = [Plan("fused", method, batch_size=3, steps=5, seed=3, lr=1e-2), replace(made("dora"), name="beside")]
    raced_and_alone(plans, lambda: inlay.attach(make("gpt2")))


# ---- the whole


def given(base_folder, reviews, out, space, **more):  # noqa: F811
    path = out.parent / "space.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(space, encoding="utf8")
    settings = {
        "base": str(base_folder), "data": [str(reviews)], "out": str(out), "space": str(path), "steps": 18,
        "batch_size": 4, "heldout": "0.5", "template": "Review: {text}\nSentiment:", "checkpoint_every": 1,
        "verbalizer": "0=negative,1=positive", "dtype": "float32",
    }  # fmt: skip
    return RaceSettings(**{**settings, **more})


def test_a_race_ends_with_the_winner_in_its_folder(base_folder, reviews, tmp_path):  # noqa: F811
    out, said = tmp_path / "run", []
    result = race(given(base_folder, reviews, out, SPACE), on_message=said.append)
    assert json.loads((out / "race.json").read_text()) == result
    page = (out / "report.html").read_text(encoding="utf8")
    assert "<span>race</span>" in page and all(one["name"].split("-")[0] in page for one in result["contenders"])
    first, *others = result["contenders"]
    assert result["winner"] == first["name"] and len(others) == 5 and result["metric"] == "loss"
    assert first["status"] == "done" and first["steps"] == 18 and all(one["steps"] < 18 for one in others[1:])
    assert {"name", "method", "config", "score", "interval", "tokens", "seconds", "trainable_parameters", "status"} <= {
        *first
    }
    assert all(one["score"] is not None and one["interval"] for one in result["contenders"]) and result["base"]
    kept_as = out / "adapters" / first["name"] / "adapter_model.safetensors"
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == kept_as.read_bytes()
    assert result["tokens"] < 0.5 * result["whole_tokens"] and any("rungs after" in line for line in said)
    assert sum(line.count("dropped at rung 1") for line in said) == 4
    again = race(given(base_folder, reviews, out, SPACE, resume=True), on_message=quiet)
    assert again["contenders"] == result["contenders"]


def test_a_race_with_little_room_takes_all_in_turn(base_folder, reviews, tmp_path):  # noqa: F811
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, at_once=2), on_message=quiet)
    assert len(result["contenders"]) == 6 and all(one["steps"] for one in result["contenders"])
    turns = [event["start"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "select"]
    assert len(turns[0]) == 2 and sum(map(len, turns)) == 6


def test_seeds_race_as_one(base_folder, reviews, tmp_path):  # noqa: F811
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, seeds=2, steps=9), on_message=quiet)
    by_status = {one["name"]: one["status"] for one in result["contenders"]}
    assert len(by_status) == 12
    assert all(by_status[name] == by_status[name[:-1] + "1"] for name in by_status if name.endswith("-s0"))


@pytest.mark.parametrize(("budget", "said"), [("30k", "rungs after"), ("60s", "a second just measured")])
def test_a_budget_bounds_the_courses(budget, said, base_folder, reviews, tmp_path):  # noqa: F811
    lines = []
    result = race(
        given(base_folder, reviews, tmp_path / "run", SPACE, steps=None, epochs=40, budget=budget),
        on_message=lines.append,
    )
    assert any(said in line for line in lines)
    if budget == "30k":
        assert 0.5 * 30_000 < result["tokens"] < 1.1 * 30_000
        assert result["contenders"][0]["steps"] < 40 * 5


BAD = {
    "a budget below a rung": ({"budget": "200", "steps": 9}, "does not take 6 contenders to their first rung"),
    "too few steps": ({"steps": 3}, "a course of 3 steps is too short for a race, which needs 5"),
    "too few rows": ({"heldout": "0.1"}, "rows choose among the contenders"),
    "no held-out rows": ({"heldout": "0"}, "0 held-out rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_raced_is_said_first(case, base_folder, reviews, tmp_path):  # noqa: F811
    more, said = BAD[case]
    with pytest.raises(UsageError, match=said):
        race(given(base_folder, reviews, tmp_path / "run", SPACE, **more), on_message=quiet)
    assert not (tmp_path / "run").exists()


def test_contenders_that_cannot_act_are_named_and_left_out(base_folder, reviews, tmp_path):  # noqa: F811
    lines, space = [], SPACE + "  - {method: bitfit, lr: [1.0e-2]}\n  - {method: merged_lora, lr: [1.0e-2]}\n"
    result = race(given(base_folder, reviews, tmp_path / "run", space), on_message=lines.append)
    left = [line for line in lines if line.startswith("left out: ")]
    assert len(left) == 2 and "bitfit" in left[0] and "bias" in left[0] and len(result["contenders"]) == 6
    alone = "entries:\n  - {method: lora, lr: [1.0e-2]}\n  - {method: bitfit, lr: [1.0e-2]}\n"
    with pytest.raises(UsageError, match="1 of 2 contenders can act"):
        race(given(base_folder, reviews, tmp_path / "other" / "run", alone), on_message=quiet)


def test_a_fusion_is_raced_over_saved_adapters_and_left_out_without_them(base_folder, reviews, tmp_path):  # noqa: F811
    bank = inlay.attach(load_base(str(base_folder), "float32").model)
    for name, method in OVER.items():
        bank.add(name, method, seed=9)
        bank.save(name, tmp_path / name)
    bank.detach()
    folders = [str(tmp_path / name) for name in OVER]
    space = f"""
entries:
  - {{method: fusion, adapters: [{folders}], lr: [1.0e-2, 1.0e-3]}}
  - {{method: fusion, adapters: [[pfeiffer-1e-2, houlsby-1e-2]], lr: [2.0e-2]}}
  - {{method: fusion, lr: [3.0e-2]}}
  - {{method: pfeiffer, lr: [1.0e-2]}}
  - {{method: houlsby, lr: [1.0e-2]}}
  - {{method: merged_lora, lr: [1.0e-2]}}
  - {{method: merged_lora, r: 2, targets: all-linear, enable_lora: [[true, false]], lr: [2.0e-2]}}
"""
    lines = []
    result = race(given(base_folder, reviews, tmp_path / "run", space, steps=6), on_message=lines.append)
    methods = [one["method"] for one in result["contenders"]]
    assert sorted(methods) == ["fusion", "fusion", "houlsby", "merged_lora", "pfeiffer"]
    left = [line for line in lines if line.startswith("left out: ")]
    assert len(left) == 3 and "no adapter is called 'pfeiffer-1e-2'" in left[0] and "Name them in adapters" in left[1]
    assert "no fused queries, keys and values" in left[2]
    assert all(one["score"] is not None for one in result["contenders"])


# ---- nothing is lost


def files(out):
    found = [*(out / "adapters").rglob("*.safetensors"), *(out / "last").rglob("*.safetensors")]
    kept_as = {str(file.relative_to(out)): file.read_bytes() for file in found}
    return kept_as | {"adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes()}


def test_a_race_that_is_killed_anywhere_goes_on_to_the_same_end(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    whole = tmp_path / "whole" / "run"
    race(given(base_folder, reviews, whole, SPACE, steps=9), on_message=quiet)
    wanted, ends = files(whole), json.loads((whole / "race.json").read_text())["contenders"]
    for number in (5, 14, 23, 37, 58):
        out = tmp_path / str(number) / "run"

        def killed(number=number, out=out):
            with dying_at(number, monkeypatch):
                race(given(base_folder, reviews, out, SPACE, steps=9), on_message=quiet)

        assert forked(killed) == -signal.SIGKILL, number
        result = race(given(base_folder, reviews, out, SPACE, steps=9, resume=True), on_message=quiet)
        assert files(out) == wanted, number
        assert [one["status"] for one in result["contenders"]] == [one["status"] for one in ends]


def test_forwards_that_memory_made_smaller_are_so_again_on_resume(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    """The first process runs short in step 3; the second, with memory to spare, still does what it did."""
    from inlay.training import gradients

    torch.set_num_threads(1)
    usual, count = gradients._gradients, {"n": 0}

    def short(*args):
        count["n"] += 1
        if count["n"] == 3:
            usual(*args)
            raise MemoryError
        return usual(*args)

    more = {"steps": 9, "checkpoint_every": 2}

    def raced(out, dies=False, **again):
        def step(learner, total):
            if dies and learner.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        race(given(base_folder, reviews, out, SPACE, **more, **again), step, quiet)

    monkeypatch.setattr(gradients, "_gradients", short)
    raced(tmp_path / "a" / "run")
    wanted = files(tmp_path / "a" / "run")
    cuts = [event for event in read_events(tmp_path / "a" / "run" / "events.jsonl") if event["event"] == "cut"]
    assert [(cut["turn"], cut["work"]) for cut in cuts] == [(2, "step")] and cuts[0]["tokens"] < 4096
    count["n"] = 0
    assert forked(lambda: raced(tmp_path / "b" / "run", dies=True)) == -signal.SIGKILL
    count["n"] = 10
    raced(tmp_path / "b" / "run", resume=True)
    assert files(tmp_path / "b" / "run") == wanted


def test_events_are_given_back_once_and_half_lines_are_none(tmp_path):
    path = tmp_path / "events.jsonl"
    first = Events(path)
    for turn in (1, 2, 2):
        first.add(turn, "cut", work="step", name="", tokens=100 * turn)
    with open(path, "ab") as file:
        file.write(b'{"turn": 3, "ev')
    again = Events(path, since=1)
    assert again.ahead(1, "cut") is None and again.ahead(2, "select") is None
    assert [again.ahead(2, "cut", work="step")["tokens"] for _ in range(2)] == [200, 200]
    assert again.ahead(2, "cut") is None
    again.add(3, "cut", work="score", name="x", tokens=7)
    assert [event["turn"] for event in read_events(path)] == [1, 2, 2, 3]


# ---- what people ask


def asked(base_folder, reviews, out, on_step=None, **more):  # noqa: F811
    """Ask something of the race in `out`; returns what was said and what came."""
    lines = []
    settings = given(base_folder, reviews, out, SPACE, resume=True, **more)
    return lines, race(settings, on_step, lines.append)


def test_a_race_that_is_over_goes_on_with_what_is_asked(base_folder, reviews, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    first = race(given(base_folder, reviews, out, SPACE), on_message=quiet)
    last = first["contenders"][-1]["name"]
    assert first["contenders"][-1]["status"].startswith("dropped")
    before = files(out)
    lines, result = asked(base_folder, reviews, out, go_on=last)
    own = {one["name"]: one for one in result["contenders"]}
    assert own[last]["status"] == "done" and own[last]["steps"] == 18 and f"{last}: goes on after step 2" in lines
    now = files(out)
    assert all(now[name] == before[name] for name in before if last not in name and name != "adapter")
    lines, result = asked(base_folder, reviews, out, clone=last, set={"lr": 0.02})
    clone = next(one for one in result["contenders"] if one["name"] == f"{last}+lr0.02")
    assert clone["lr"] == 0.02 and clone["steps"] > 0 and len(result["contenders"]) == 7
    assert result["rungs"] == first["rungs"]
    again = race(given(base_folder, reviews, out, SPACE, resume=True), on_message=quiet)
    assert again["contenders"] == result["contenders"]


WRONG = {
    "nobody": ({"go_on": "nobody"}, "no contender is called 'nobody'"),
    "stop at the end": ({"stop": "ia3-3e-2"}, "is over"),
    "two things": ({"stop": "a", "go_on": "b"}, "are two things"),
    "settings alone": ({"set": {"lr": 1}}, "--set goes with --clone"),
}


@pytest.fixture(scope="module")
def over(base_folder, reviews, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("over") / "run"
    race(given(base_folder, reviews, out, SPACE, steps=6), on_message=quiet)
    return out


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_is_said(case, over, base_folder, reviews):  # noqa: F811
    more, said = WRONG[case]
    with pytest.raises(UsageError, match=said):
        asked(base_folder, reviews, over, steps=6, **more)


def test_what_is_asked_of_a_running_race_outlives_a_kill(base_folder, reviews, tmp_path):  # noqa: F811
    """It is asked at step 4; the process dies at step 5, and the one that goes on from step 3 is asked again."""
    torch.set_num_threads(1)
    first = race(given(base_folder, reviews, tmp_path / "first" / "run", SPACE), on_message=quiet)["winner"]

    def raced(out, dies, **more):
        def step(learner, total):
            if learner.step == 4 and learner.plan.name == first and not more:
                Requests(out / "requests").put(Ask("clone", first, {"lr": 0.05}))
                Requests(out / "requests").put(Ask("stop", first))
                Requests(out / "requests").put(Ask("stop", "nobody"))
            if dies and learner.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        lines = []
        result = race(given(base_folder, reviews, out, SPACE, checkpoint_every=3, **more), step, lines.append)
        return lines, result

    lines, whole = raced(tmp_path / "a" / "run", False)
    statuses = {one["name"]: one["status"] for one in whole["contenders"]}
    assert statuses[first] == "stopped by hand" and f"{first}+lr0.05" in statuses
    assert any("nobody" in line for line in lines)
    assert forked(lambda: raced(tmp_path / "b" / "run", True)) == -signal.SIGKILL
    _, again = raced(tmp_path / "b" / "run", False, resume=True)
    assert {one["name"]: one["status"] for one in again["contenders"]} == statuses
    assert files(tmp_path / "b" / "run") == files(tmp_path / "a" / "run")
