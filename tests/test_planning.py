"""What a plan counts, predicts and proposes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import count

import pytest
import torch
from typer.testing import CliRunner

import inlay
from inlay.cli.app import app
from inlay.cli.plan import table
from inlay.data.scripts import scripts
from inlay.data.typical import typical_rows
from inlay.errors import UsageError
from inlay.methods.table import GROUPS, METHODS
from inlay.planning.answers import Answer, Course, answers, heldout_rows, misses
from inlay.planning.candidates import Candidate, candidates
from inlay.planning.choosing import choose, preferences
from inlay.planning.counting import NAME, Cost, Ground, cost_of, trial
from inlay.planning.measuring import Line, Pace, step_seconds, token_seconds
from inlay.planning.plan import plan
from inlay.planning.settings import Limits, PlanSettings, limits_of
from inlay.runs.settings import Settings
from inlay.runtime.tasks import GENERATE
from test_crash import reviews, settings  # noqa: F401
from test_training import examples
from zoo import make

COST = Cost(trained=1000, file_mb=1.0, tokens=0, merges=True, memory_mb=800, least_mb=600)
LINE = Line(0.1, 0.01)
COURSE = Course(steps=50, tokens=100)


def named(method: str, group: str = "g", **more) -> Candidate:
    return Candidate(method, group, more)


def ground(name="llama", **more) -> Ground:
    given = Settings(data=["x"], out="x", **{"batch_size": 4, **more})
    return Ground(given, inlay.attach(make(name)), None, GENERATE, examples(), 100.0)


# ---- what is compared


def test_every_method_is_a_candidate_and_each_group_has_one_before_any_has_two():
    found = candidates()
    usual = [one for one in found if not one.set]
    assert sorted(one.method for one in usual) == sorted(METHODS) and found[: len(usual)] == usual
    assert [one.group for one in usual[: len(GROUPS)]] == [*GROUPS]
    assert usual[0].label == "lora r 8"
    assert [one.set["r"] for one in found if one.method == "lora" and one.set] == [4, 16, 32]
    assert {one.method for one in candidates(("ia3", "prompt"))} == {"ia3", "prompt"}


def test_the_proposed_methods_are_methods():
    assert all(own["method"] in METHODS and own["why"] for own in preferences())


# ---- what the rows are


def test_scripts_are_told_by_letters():
    assert scripts(["a good film 很好"]) == {"Latin": 9 / 11, "Han": 2 / 11}
    assert [*scripts(["Фильм 1", "한국 ｱ ア あ", "é"])] == ["Cyrillic", "Kana", "Hangul", "Latin"]
    assert scripts(["123 !?", ""]) == {}


# ---- what is counted


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "houlsby", "full"])
def test_an_adapter_is_counted_and_forgotten(method, tmp_path):
    here = ground()
    before = {name: p.clone() for name, p in here.bank.model.named_parameters()}
    state = torch.get_rng_state()
    cost = cost_of(here, named(method))
    assert not here.bank.adapters and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in here.bank.model.named_parameters())
    adapter = here.bank.add("a", METHODS[method](), seed=0)
    assert cost.trained == len(adapter) and cost.tokens == adapter.virtual_length + adapter.prefix_length
    here.bank.save("a", tmp_path)
    assert cost.file_mb * 2**20 == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert cost.memory_mb >= cost.least_mb > here.rest_mb
    try:
        here.bank.merge("a")
    except UsageError:
        assert not cost.merges
    else:
        assert cost.merges


def test_another_size_takes_the_memory_of_the_usual_one_and_its_own_parameters():
    here = ground()
    usual = cost_of(here, named("lora"))
    wide = cost_of(here, named("lora", r=16), usual)
    assert wide.trained == 2 * usual.trained
    assert wide.memory_mb - usual.memory_mb == pytest.approx(7 * 4 * usual.trained / 2**20)


def test_what_cannot_act_on_a_base_says_why():
    with pytest.raises(UsageError, match="biases"):
        cost_of(ground(), named("bitfit"))


# ---- what is measured


def test_a_line_goes_through_two_steps():
    line = Line.through((100, 2.0), (400, 5.0))
    assert line.seconds(100) == pytest.approx(2.0) and line.seconds(1000) == pytest.approx(11.0)
    assert line.fixed == pytest.approx(1.0)
    assert Line.through((100, 5.0), (400, 4.0)) == Line(0.0, 0.01)  # noise: the larger step alone
    assert Line.through((100, 2.0), (100, 2.0)) == Line(0.0, 0.02)


def test_rows_to_try_have_the_lengths_of_all():
    rows = examples()
    mean = sum(len(row.ids) for row in rows) / len(rows)
    chosen = typical_rows(rows, 40)
    assert sum(len(row.ids) for row in chosen) == pytest.approx(40, rel=0.25)
    assert sum(len(row.ids) for row in chosen) / len(chosen) == pytest.approx(mean, rel=0.25)
    assert len(typical_rows(rows, 1)) == 1 and len(typical_rows(rows, 10**6)) == len(rows)


def test_the_fastest_step_and_token_count():
    here, rows = ground(), examples()[:4]
    moments = iter([0.0, 9.0, 11.0, 12.5])
    with trial(here, named("lora"), rows, 4) as learner:
        assert step_seconds(here, learner, rows, lambda: next(moments)) == 1.5
        ticks = count()
        assert token_seconds(here, NAME, 2, lambda: float(next(ticks))) == (1.0, 1.0)
        assert learner.step == 3
    assert not here.bank.adapters


# ---- what is answered


def test_time_is_that_of_the_base_times_what_the_method_was_measured_to_take():
    lora, dora, prefix, other = named("lora"), named("dora"), named("prefix", "keys"), named("lora", r=16)
    costs = {lora: COST, dora: COST, other: COST, prefix: replace(COST, merges=False)}
    paces = {lora: Pace(0.5, None), prefix: Pace(0.75, 0.02)}
    found = answers(costs, paces, LINE, 0.01, COURSE, Limits())
    assert [one.step for one in found] == pytest.approx([1.1, 1.65 * 2 / 3, 1.1, 1.65])
    assert found[0].seconds == pytest.approx(55)
    assert [one.how for one in found] == ["measured", "as lora", "as lora", "measured"]
    assert [one.token_ms for one in found] == pytest.approx([10, 10, 10, 20])
    assert all(one.fits for one in found)


def test_a_part_of_a_step_does_not_grow_by_its_tokens():
    lora, full = Pace(0.5, row=0.1, large=2.1), Pace(1.4, row=0.6, large=4.6)  # 0.4 s whatever the tokens are
    assert full.seconds(lora, 5.0) == pytest.approx(2 * 5.0 + 0.4)
    assert Pace(1.4).seconds(lora, 5.0) == pytest.approx(14.0)  # in proportion, where no more is known
    assert Pace(1.0, row=0.1, large=4.2).seconds(lora, 5.0) == pytest.approx(10.0)  # or the rest would be below zero


def test_a_time_that_is_too_low_for_certain_says_so():
    lora, full = named("lora"), named("full")
    found = answers({lora: COST, full: replace(COST, trained=10**9)}, {lora: Pace(0.5)}, LINE, None, COURSE, Limits())
    assert [one.how for one in found] == ["measured", "at least as lora"]
    assert not misses(found[0], Limits(seconds=99)) and "not measured" in misses(found[1], Limits(seconds=99))[0]


@pytest.mark.parametrize(("limits", "word"), [
    (Limits(memory_mb=500), "memory"), (Limits(seconds=10), "time"), (Limits(file_mb=0.5), "file"),
    (Limits(token_ms=5), "latency"),
])  # fmt: skip
def test_what_is_beyond_a_limit_is_named(limits, word):
    answer = Answer(named("lora"), COST, 1.0, 60.0, 7.0, "measured")
    (said,) = misses(answer, limits)
    assert said.startswith(word) and not misses(answer, Limits(700, 100, 2, 1, 8))


def test_a_latency_that_was_not_measured_does_not_fit():
    (said,) = misses(Answer(named("prefix"), COST, 1.0, 60.0, None, "as lora"), Limits(token_ms=5))
    assert "not measured" in said


def answer(method, trained, *missed, tokens=0, merges=True, **more) -> Answer:
    cost = replace(COST, trained=trained, tokens=tokens, merges=merges)
    return Answer(named(method, **more), cost, 1.0, 1.0, 1.0, "measured", missed)


def test_lora_is_proposed_where_it_fits_in_the_largest_size_up_to_its_usual_one():
    usual, small, wide = answer("lora", 80), answer("lora", 40, r=4), answer("lora", 160, r=16)
    others = [answer("ia3", 5), answer("prompt", 2, tokens=20, merges=False)]
    assert choose([usual, small, wide, *others], Limits()).answer is usual
    chosen = choose([replace(usual, misses=("file: 3 MB",)), small, wide, *others], Limits())
    assert chosen.answer is small and "lora" in chosen.why[0]


def test_prompts_are_proposed_only_where_latency_is_free():
    lora = answer("lora", 80, "file: 3 MB")
    prompt, houlsby = answer("prompt", 2, tokens=20, merges=False), answer("houlsby", 30, merges=False)
    free = choose([lora, prompt, houlsby], Limits())
    assert free.answer is prompt and any("20 tokens" in line for line in free.why)
    assert any("lora does not fit (file: 3 MB)" in line for line in free.why)
    assert choose([lora, prompt, houlsby], Limits(token_ms=50)).answer is houlsby
    tiny = answer("ia3", 5)
    assert choose([lora, prompt, tiny], Limits()).answer is tiny


def test_where_nothing_fits_it_says_what_helps():
    found = choose([answer("lora", 80, "time: 90 s"), answer("ia3", 5, "memory: 9 MB at least")], Limits())
    assert found.answer is None and "No method fits." in found.why
    assert "--limit" in found.why[-1] and "--quantize" in found.why[-1] and "--file" not in found.why[-1]


def test_rows_that_tell_a_point_apart():
    seen, likely = heldout_rows(1.0, 0.12)
    assert seen == 4610 and likely == 9417  # 1.96^2 d / p^2, and Connor's formula with 80 % power
    assert heldout_rows(5.0, 0.12)[0] == 185
    assert heldout_rows(10.0, 0.01)[0] == heldout_rows(10.0, 0.1)[0]  # they disagree on as much as they differ by


# ---- settings


def test_limits_are_read():
    given = PlanSettings(data=["x"], memory="8GB", budget="30m", file="200KB", serve="8,40ms")
    assert limits_of(given) == Limits(8192, 1800, 200 / 1024, 8, 40)
    assert limits_of(PlanSettings(data=["x"], serve="4")) == Limits(rows=4)


@pytest.mark.parametrize("wrong", [
    {"memory": "much"}, {"budget": "30"}, {"budget": "0m"}, {"budget": "2 moons"}, {"serve": "x"}, {"serve": "0"},
    {"serve": "8,40"}, {"file": "-1KB"}, {"disagree": 101}, {"seconds": 0},
])  # fmt: skip
def test_other_limits_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        PlanSettings(data=["x"], **wrong)


# ---- the whole


WORDS = ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive"]


@pytest.fixture(scope="module")
def planned(base_folder, reviews):  # noqa: F811
    words = {"template": "Review: {text}\nSentiment:", "verbalizer": "0=negative,1=positive"}
    given = PlanSettings(
        base=str(base_folder), data=[str(reviews)], dtype="float32", batch_size=4, epochs=2, heldout="0.2",
        memory="64GB", seconds=1e-9, **words,
    )  # fmt: skip
    said: list[str] = []
    return plan(given, said.append, only=("lora", "ia3", "prompt", "bitfit")), said


def test_a_plan_answers_for_each_method(planned):
    result, _ = planned
    json.dumps(result)
    labels = [own["label"] for own in result["methods"]]
    assert {"lora r 8", "lora r 4", "lora r 32", "ia3", "prompt tokens 20"} <= {*labels}
    assert [one["label"] for one in result["left_out"]] == ["bitfit"] and "biases" in result["left_out"][0]["why"]
    assert (
        result["course"]["steps"] == 16
        and result["data"]["rows"] == 32
        and sum(result["data"]["labels"].values()) == 32
    )
    assert next(iter(result["data"]["scripts"])) == "Latin" and 0.3 < result["data"]["characters_a_token"] < 20
    first, *others = result["methods"]
    assert first["how"] == "measured" and all(own["how"] != "measured" for own in others)  # no time was given
    assert first["seconds"] == pytest.approx(16 * first["step_seconds"])
    assert result["choice"]["label"] == "lora r 8" and result["why"]
    table(result)


def test_its_command_trains_what_was_planned(planned, tmp_path, base_folder):
    words = shlex.split(planned[0]["command"])
    assert words[:4] == ["inlay", "train", "--base", str(base_folder)] and "64GB" in words
    out = tmp_path / "run"
    words[words.index("--out") + 1] = str(out)
    made = CliRunner().invoke(app, [*words[1:], "--json"])
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["steps"] == 16 and result["trainable_parameters"] == planned[0]["choice"]["trainable_parameters"]
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size / 2**20 == planned[0]["choice"]["file_mb"]


def test_the_command_says_it_in_one_object(base_folder, reviews, monkeypatch):  # noqa: F811
    import inlay.planning.plan as whole

    monkeypatch.setattr(whole, "candidates", lambda only: candidates(("lora", "ia3")))
    call = [
        "plan",
        "--base",
        str(base_folder),
        "--data",
        str(reviews),
        *WORDS,
        "--dtype",
        "float32",
        "--seconds",
        "0.001",
    ]
    made = CliRunner().invoke(app, [*call, "--json"])
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["choice"]["method"] == "lora" and len(made.stdout.splitlines()) == 1
    made = CliRunner().invoke(app, [*call, "--file", "1KB"])
    assert made.exit_code == 0 and "No method fits" in made.stdout and "inlay train" not in made.stdout
    made = CliRunner().invoke(app, [*call, "--serve", "fast"])
    assert made.exit_code == 2 and "rows at once" in made.stderr and "Traceback" not in made.stderr


def test_a_plan_warns_where_virtual_tokens_collide_with_the_template(base_folder, tmp_path, monkeypatch):
    import inlay.planning.plan as whole

    data, jinja = tmp_path / "talk.jsonl", tmp_path / "bos.jinja"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    data.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(8)))
    jinja.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    monkeypatch.setattr(whole, "candidates", lambda only: candidates(("lora", "prompt")))
    call = ["plan", "--base", str(base_folder), "--data", str(data), "--heldout", "0", "--seconds", "0.001"]
    call += ["--template", str(jinja), "--virtual-tokens-at", "before-answer"]
    made = CliRunner().invoke(app, [*call, "--json"])
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["choice"]["method"] == "lora" and "--virtual-tokens-at" not in result["command"]  # it has none
    (told,) = result["warnings"]
    assert told["kind"] == "inside-control" and told["methods"] == ["prompt"] and told["rows"] == 8
    made = CliRunner().invoke(app, call)
    assert "warning: with prompt, virtual tokens stand inside what opens a turn" in " ".join(made.stdout.split())
