"""Contenders of a race whose virtual tokens stand at different places: each equals its solo run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from inlay.data.choose import Columns, choose_template
from inlay.data.encode import PLACES, Encoder
from inlay.data.table import read_table
from inlay.errors import UsageError
from inlay.race import latency
from inlay.race.contenders import contenders
from inlay.race.race import race
from inlay.race.settings import RaceSettings
from inlay.race.space import read_space
from inlay.runs.planning import recorded_plans
from inlay.runs.run import run
from inlay.runs.settings import Settings
from test_crash import reviews  # noqa: F401

SPACE = """
entries:
  - {method: prompt, num_virtual_tokens: 3, lr: 1.0e-2, virtual_tokens_at: [before-answer, start]}
  - {method: lora, r: 2, lr: 1.0e-3}
"""
NAMES = ["prompt-3-before-answer-1e-2", "prompt-3-start-1e-2", "lora-r2-1e-3"]


def quiet(line):
    pass


@pytest.fixture(autouse=True)
def latency_of_few(monkeypatch):
    monkeypatch.setattr(latency, "LEAST", 0.0)
    monkeypatch.setattr(latency, "SHARE", 0.0)


@pytest.fixture
def space(tmp_path):
    def space(text=SPACE):
        path = tmp_path / "race.yaml"
        path.write_text(text, encoding="utf8")
        return str(path)

    return space


@pytest.fixture
def given(base_folder, reviews, tmp_path):  # noqa: F811
    return {
        "base": str(base_folder), "data": [str(reviews)], "heldout": "0.5", "template": "Review: {text}\nSentiment:",
        "verbalizer": "0=negative,1=positive", "dtype": "float32", "batch_size": 4,
    }  # fmt: skip


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def notes(folder):
    return json.loads((folder / "inlay.json").read_text(encoding="utf8"))["virtual_tokens_at"]


def test_each_equals_its_solo_run_at_its_place(given, space, tmp_path):
    out = tmp_path / "race"
    result = race(RaceSettings(**given, out=str(out), space=space(), steps=9, at_once=2), on_message=quiet)
    own = {one["name"]: one for one in result["contenders"]}
    assert sorted(own) == sorted(NAMES)
    plans = {plan.name: plan for plan in recorded_plans(json.loads((out / "run.json").read_text()))}
    for name, place in zip(NAMES, ("before-answer", "start", "start"), strict=True):
        taken = own[name]["steps"]
        solo = tmp_path / name
        at = {} if name == NAMES[2] else {"virtual_tokens_at": place}
        settings = Settings(**given, out=str(solo), **at, eval_every=taken)
        scored = run(settings, on_message=quiet, plans=[replace(plans[name], name="adapter", stop_after=taken)])
        found, wanted = tensors(out / "last" / name), tensors(solo / "last")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        assert notes(out / "adapters" / name) == notes(solo / "adapter") == place
        if taken == 9:
            assert own[name]["score"] == pytest.approx(scored["heldout"]["loss"], abs=1e-5)
    at_start, before = (tensors(out / "last" / name)["prompt_embeddings"] for name in (NAMES[1], NAMES[0]))
    assert not torch.equal(at_start, before)
    assert "before-answer" in (out / "report.html").read_text(encoding="utf8")


def test_train_alone_gives_the_same_scores(given, space, tmp_path):
    """The winner by the command's own settings, without a plan."""
    text = SPACE.replace("[before-answer, start]", "before-answer").replace("lora, r: 2, lr", "ia3, lr")
    out = tmp_path / "race"
    result = race(RaceSettings(**given, out=str(out), space=space(text), steps=9, at_once=2), on_message=quiet)
    first = next(one for one in result["contenders"] if one["method"] == "prompt")
    more = {"virtual_tokens_at": "before-answer", "method": "prompt", "set": {"num_virtual_tokens": 3}, "lr": 1e-2}
    plain = Settings(**given, **more, out=str(tmp_path / "solo"), steps=9, eval_every=first["steps"])
    assert first["steps"] == 9
    scored = run(plain, on_message=quiet)
    assert first["score"] == pytest.approx(scored["heldout"]["loss"], abs=1e-5)
    assert result["base"] == pytest.approx(scored["heldout_base"]["loss"], abs=1e-6)


def test_the_flag_is_for_those_that_have_virtual_tokens(given, space, tmp_path):
    text = SPACE.replace(", virtual_tokens_at: [before-answer, start]", "")
    settings = RaceSettings(**given, out=str(tmp_path / "run"), space=space(text), steps=9)
    race(replace(settings, virtual_tokens_at="before-answer"), on_message=quiet)
    folder = tmp_path / "run" / "adapters"
    assert [notes(folder / name) for name in ("prompt-3-1e-2", "lora-r2-1e-3")] == ["before-answer", "start"]
    card = (folder / "lora-r2-1e-3" / "README.md").read_text(encoding="utf8")
    assert "virtual-tokens-at" not in card


def test_places_that_nobody_can_take_are_refused(given, space, tmp_path):
    without = "entries:\n  - {method: lora, lr: [1.0e-2, 1.0e-3]}\n"
    settings = RaceSettings(**given, out=str(tmp_path / "run"), space=space(without), steps=9)
    with pytest.raises(UsageError, match="no contender has virtual tokens to stand at after-system"):
        race(replace(settings, virtual_tokens_at="after-system"), on_message=quiet)
    for method, said in (("lora", "it has no virtual tokens"), ("prefix", "keys of a prefix stand before every token")):
        wrong = f"entries:\n  - {{method: {method}, virtual_tokens_at: [start, before-answer]}}\n"
        with pytest.raises(UsageError, match=rf"entry 1 \({method}\): .* cannot act at before-answer \({said}\)"):
            contenders(read_space(space(wrong)), None, seed=0, rows=100)
    with pytest.raises(UsageError, match="place 'end' is not known"):
        read_space(space("entries:\n  - {method: prompt, virtual_tokens_at: [start, end]}\n"))


def test_those_that_the_flag_makes_equal_race_once(given, space, tmp_path):
    text = SPACE.replace(
        "virtual_tokens_at: [before-answer, start]}", "virtual_tokens_at: before-answer}\n"
        "  - {method: prompt, num_virtual_tokens: 3, lr: 1.0e-2}",
    )  # fmt: skip
    said, settings = [], RaceSettings(**given, out=str(tmp_path / "run"), space=space(text), steps=9)
    result = race(replace(settings, virtual_tokens_at="before-answer"), on_message=said.append)
    assert sorted(one["name"] for one in result["contenders"]) == [NAMES[2], NAMES[0]]
    assert f"left out: prompt-3-1e-2: with the settings of this race it is {NAMES[0]}" in said
    text = text.replace("  - {method: lora, r: 2, lr: 1.0e-3}\n", "")
    with pytest.raises(UsageError, match=f"all contenders are {NAMES[0]} with the settings of this race"):
        other = {"space": space(text), "out": str(tmp_path / "other")}
        race(replace(settings, virtual_tokens_at="before-answer", **other), on_message=said.append)


def test_a_clone_may_stand_elsewhere(given, space, tmp_path):
    text = SPACE.replace("[before-answer, start]", "start")
    settings = RaceSettings(**given, out=str(tmp_path / "run"), space=space(text), steps=9)
    race(settings, on_message=quiet)
    lines = []
    asked = replace(settings, resume=True, clone="prompt-3-start-1e-2", set={"virtual_tokens_at": "before-answer"})
    result = race(asked, on_message=lines.append)
    clone = "prompt-3-start-1e-2+virtual_tokens_atbefore-answer"
    assert clone in {one["name"] for one in result["contenders"]}, lines
    assert notes(tmp_path / "run" / "adapters" / clone) == "before-answer"
    wrong = replace(settings, resume=True, clone="lora-r2-1e-3", set={"virtual_tokens_at": "before-answer"})
    race(wrong, on_message=lines.append)
    assert any("LoRA cannot act at before-answer" in line for line in lines)


def test_a_race_from_before_places_were_varied_goes_on(given, space, tmp_path):
    """Its record holds one place for all."""
    text, out = SPACE.replace(", virtual_tokens_at: [before-answer, start]", ""), tmp_path / "run"
    settings = RaceSettings(**given, out=str(out), space=space(text), steps=9, virtual_tokens_at="before-answer")
    result = race(settings, on_message=quiet)
    record = json.loads((out / "run.json").read_text(encoding="utf8"))
    for plan in record["plans"].values():
        del plan["virtual_tokens_at"]
    (out / "run.json").write_text(json.dumps(record), encoding="utf8")
    assert [plan.virtual_tokens_at for plan in recorded_plans(record)] == ["before-answer", None]
    assert race(replace(settings, resume=True), on_message=quiet)["contenders"] == result["contenders"]


TALK = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "an answer"},
]


@pytest.mark.parametrize("length", [64, 24])
def test_places_change_no_token(length, tokenizer, reviews, tmp_path):  # noqa: F811
    """So that contenders of all places share rows, their order and their loss masks."""
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": TALK[1:]}), encoding="utf8")
    seen = set()
    for file in (reviews, talk):
        table = read_table([str(file)])
        template = choose_template(table, Columns())
        encoders = [Encoder(tokenizer, template, length, place) for place in PLACES]
        made = [[e for own in one.drafts(table.rows) for e in own] for one in encoders]
        first, *others = [[(e.ids, e.loss_mask, e.sample, e.cut) for e in one] for one in made]
        assert others == [first, first]
        assert any(cut for *_, cut in first) == (length == 24)
        seen |= {tuple(one.virtual_at for one in row) for row in zip(*made, strict=True)}
    assert length < 64 or any(len(set(row)) == 3 for row in seen)


def test_runs_say_once_what_is_wrong_with_a_place(given, space, tmp_path):
    """As `preview` and `plan` do; a race says whose virtual tokens they are."""
    talk = tmp_path / "talk.jsonl"
    asks = [[{"role": "user", "content": f"question {n}"}, TALK[2]] for n in range(40)]
    talk.write_text("".join(json.dumps({"messages": one}) + "\n" for one in asks), encoding="utf8")
    given = {**given, "data": [str(talk)], "template": None, "verbalizer": None, "steps": 9}
    more = {"method": "prompt", "set": {"num_virtual_tokens": 3}, "virtual_tokens_at": "after-system"}
    said, out = [], tmp_path / "run"
    run(Settings(**{**given, "steps": 1}, **more, out=str(out)), on_message=said.append)
    (line,) = [line for line in said if "warning: " in line]
    assert line.startswith("warning: ") and line in json.loads((out / "run.json").read_text())["notices"]
    said = []
    run(Settings(**{**given, "steps": 1}, out=str(tmp_path / "lora")), on_message=said.append)
    assert not any("warning" in line for line in said)
    text = SPACE.replace("[before-answer, start]", "[after-system, start]")
    race(RaceSettings(**given, out=str(tmp_path / "race"), space=space(text)), on_message=said.append)
    (line,) = [line for line in said if "warning: " in line]
    assert line.startswith("prompt-3-after-system-1e-2: warning: ")
