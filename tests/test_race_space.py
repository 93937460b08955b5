"""Spaces of contenders: the named ones, grids, samples, ties, conditions, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import transformers as tf

import inlay
from inlay.bases import extras
from inlay.errors import InlayError, UsageError
from inlay.methods.table import METHODS
from inlay.race.contenders import Contender, contenders
from inlay.race.entries import COURSE_FIELDS
from inlay.race.space import read_space
from inlay.race.space_files import NAMED
from inlay.values import fields_of
from zoo import small


@pytest.fixture
def raced(tmp_path):
    """The contenders of a space that is written as YAML."""

    def raced(text: str, count: int | None = None, **more) -> list[Contender]:
        path = tmp_path / "race.yaml"
        path.write_text(text, encoding="utf8")
        return contenders(read_space(str(path)), count, **{"seed": 0, "rows": 5000, **more})

    return raced


def values(found: list[Contender], *names: str) -> list[tuple]:
    return [tuple({**one.set, **one.course}.get(name) for name in names) for one in found]


# ---- the named spaces


@pytest.mark.parametrize("rows", [200, 5000])
@pytest.mark.parametrize("name", NAMED)
def test_a_named_space_is_the_beginning_of_one_list(name, rows):
    found = contenders(read_space(name), None, seed=0, rows=rows)
    assert len(found) == NAMED[name]
    assert found == contenders(read_space("wide"), NAMED[name], seed=1, rows=rows)
    assert len({one.name.lower() for one in found}) == len(found)
    assert all(re.fullmatch(r"\w[\w.+-]*", one.name, re.ASCII) and one.course["lr"] > 0 for one in found)


def test_few_contenders_are_of_several_methods():
    space = read_space("default")
    for count, kinds in ((2, 2), (4, 3), (6, 5), (16, 7)):
        assert len({one.method for one in contenders(space, count, seed=0, rows=5000)}) >= kinds
    assert len(contenders(space, 30, seed=0, rows=5000)) == 30


def test_dropout_is_tried_where_rows_are_few():
    few, many = (contenders(read_space("default"), None, seed=0, rows=rows) for rows in (999, 1000))
    assert [one.set["dropout"] for one in few if "dropout" in one.set] == [0.1]
    assert not any("dropout" in one.set for one in many)


def test_rates_go_around_the_method_s_own():
    found = contenders(read_space("default"), None, seed=0, rows=5000)
    lora = [one.course["lr"] for one in found if (one.method, dict(one.set)) == ("lora", {})]
    assert lora == pytest.approx([share * METHODS["lora"].lr for share in (1, 0.3, 3)])
    network = next(one for one in found if one.set.get("prefix_projection"))
    assert network.course["lr"] == METHODS["prefix"](prefix_projection=True).usual_rate != METHODS["prefix"].lr


def test_contenders_of_the_named_spaces_fit_a_small_llama(tokenizer):
    sizes = small(hidden_size=128, intermediate_size=128)  # the projections of keys and values have 64 features
    bank = inlay.attach(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)))
    for one in contenders(read_space("wide"), None, seed=0, rows=200):
        plan = one.plan(4, {"batch_size": 2})
        assert (plan.steps, plan.batch_size, plan.rate) == (4, 2, one.course["lr"])
        bank.add(one.name, plan.method.with_tokenizer(tokenizer))


def test_words_for_people(raced):
    text = """
entries:
- {method: lora, targets: [all-linear, qv], lr: 1e-3}
- {method: lora, dropout: 0.1, lr: 3.5e-4}
- {method: prefix, prefix_projection: true, lr: 1}
"""
    assert {one.name: one.line() for one in raced(text)} == {
        "lora-r8-1e-3": "LoRA r=8 all-linear lr 1e-3",
        "lora-r8-qv-1e-3": "LoRA r=8 qv lr 1e-3",
        "lora-r8-drop0.1-3.5e-4": "LoRA r=8 all-linear dropout=0.1 lr 3.5e-4",
        "prefix-20-network-1e0": "Prefix tuning 20 tokens network lr 1e0",
    }
    with_course = Contender("x", "ia3", {}, {"lr": 0.00135, "warmup": 0.1, "batch_size": 16, "seed": 0}, twin="y")
    assert with_course.line() == "IA³ warmup 0.1 lr 1.35e-3 seed 0"


# ---- grids


def test_a_small_space_of_lists_is_a_grid_in_the_order_it_is_written(raced):
    found = raced("entries:\n- {method: lora, r: [4, 8], targets: [qv, [q_proj]], lr: 1e-3}\n- {method: ia3}")
    assert [one.method for one in found] == ["lora"] * 4 + ["ia3"]
    assert values(found[:4], "r", "targets") == [(4, "qv"), (4, ["q_proj"]), (None, "qv"), (None, ["q_proj"])]
    assert [one.name for one in found][:3] == ["lora-r4-qv-1e-3", "lora-r4-q_proj-1e-3", "lora-r8-qv-1e-3"]
    assert found[4].course == {"lr": METHODS["ia3"].lr}


def test_a_tie_follows_its_field(raced):
    found = raced("entries:\n- {method: [lora, dora], alpha: {times: r, by: 2}, r: [4, 16], lr: {times: usual, by: 3}}")
    rates = [float(f"{3 * METHODS[name].lr:.12g}") for name in ("lora", "dora")]
    assert values(found, "r", "alpha", "lr") == [(r, 2 * r, rate) for rate in rates for r in (4, 16)]
    assert raced("entries:\n- {method: lora, alpha: {times: r, by: 4}, lr: [1e-3, 1e-4]}")[0].set == {"alpha": 32}
    decay = raced("entries:\n- {method: lora, weight_decay: {times: lr, by: 3}, lr: [0.1, 0.2]}")
    assert values(decay, "weight_decay") == [(0.3,), (0.6,)]


def test_a_condition_varies_a_field_only_where_it_holds(raced):
    text = "entries:\n- {method: lora, dropout: {choices: [0.05, 0.1], when: {r: [16, 32]}}, r: [4, 16, 32]}"
    assert values(raced(text), "r", "dropout") == [
        (4, None), (16, 0.05), (16, 0.1), (32, 0.05), (32, 0.1)
    ]  # fmt: skip
    text = """
entries:
- method: prefix
  prefix_projection: [true, false]
  encoder_hidden_size: {value: 8, when: {prefix_projection: true}}
"""
    assert values(raced(text), "prefix_projection", "encoder_hidden_size") == [(True, 8), (None, None)]
    text = "entries:\n- {method: lora, r: [4, 8], lr: {value: 0.1, when: {r: 4}}}"
    assert values(raced(text), "r", "lr") == [(4, 0.1), (None, METHODS["lora"].lr)]


def test_a_chain_of_conditions_goes_by_defaults(raced):
    text = """
entries:
- method: lora
  use_rslora: {choices: [true, false], when: {dropout: 0}}
  dropout: {choices: [0, 0.1], when: {r: 4}}
  r: [4, 16]
"""
    assert values(raced(text), "r", "dropout", "use_rslora") == [
        (4, None, True), (4, None, None), (4, 0.1, None), (16, None, True), (16, None, None)
    ]  # fmt: skip


def test_what_two_entries_hold_takes_part_once(raced):
    assert len(raced("entries:\n- {method: lora, r: [4, 8]}\n- {method: lora, r: [8, 16]}")) == 3


def test_the_course_is_shared_and_an_entry_goes_before_it(raced):
    text = (
        "course: {warmup: 0.1, batch_size: 4, lr: 1e-3}\nentries:\n- {method: lora}\n- {method: ia3, warmup: [0, 0.2]}"
    )
    found = raced(text)
    assert values(found, "warmup", "batch_size") == [(0.1, 4), (0.0, 4), (0.2, 4)]
    assert [one.name for one in found] == [
        "lora-r8-warmup0.1-batch_size4-1e-3", "ia3-batch_size4-1e-3", "ia3-warmup0.2-batch_size4-1e-3"
    ]  # fmt: skip


def test_a_range_with_a_step_is_a_list(raced):
    assert values(raced("entries:\n- {method: lora, dropout: {low: 0, high: 0.3, step: 0.1}}"), "dropout") == [
        (None,), (0.1,), (0.2,), (0.3,)
    ]  # fmt: skip


def test_take_first_and_the_file_s_own_count(raced):
    text = "take: first\ncontenders: 3\nentries:\n- {method: lora, r: [1, 2, 3, 4]}\n- {method: ia3}"
    assert values(raced(text), "r") == [(1,), (2,), (3,)]
    assert [one.method for one in raced(text, 9)] == ["lora"] * 4 + ["ia3"]


def test_entries_for_few_rows_alone(raced):
    text = "entries:\n- {method: lora, r: [4, 8]}\n- {method: ia3, rows_below: 10}"
    assert len(raced(text, rows=10)) == 2 and len(raced(text, rows=9)) == 3


# ---- samples

RANGES = """
entries:
- {method: lora, r: [4, 8, 16, 32], lr: {low: 1e-4, high: 1e-2, log: true}, dropout: {low: 0, high: 0.2}}
- {method: prefix, num_virtual_tokens: {low: 5, high: 40}}
- {method: ia3}
"""


def test_samples_are_the_same_for_the_same_seed(raced, capfd):
    found = raced(RANGES, 20)
    assert found == raced(RANGES, 20) and found != raced(RANGES, 20, seed=1)
    assert [one.method for one in found[:5]] == ["lora", "prefix", "ia3", "lora", "prefix"]
    assert len({json.dumps([one.method, one.set, one.course]) for one in found}) == len(found) == 20
    assert found[:7] == raced(RANGES, 7)
    assert capfd.readouterr() == ("", "")


def test_samples_lie_in_their_ranges_and_far_from_one_another(raced):
    found = raced("entries:\n- {method: lora, r: [4, 8, 16, 32], lr: {low: 1e-4, high: 1e-2, log: true}}", 16)
    rates = [rate for (rate,) in values(found, "lr")]
    edges = [1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2]
    inside = [sum(low <= rate <= high for rate in rates) for low, high in pairwise(edges)]
    assert inside == [4, 4, 4, 4]
    assert sorted(one.set.get("r", 8) for one in found) == [4] * 4 + [8] * 4 + [16] * 4 + [32] * 4
    assert all(rate == float(f"{rate:.3g}") for rate in rates)
    tokens = raced("entries:\n- {method: prompt, num_virtual_tokens: {low: 5, high: 8}}", 4)
    assert sorted(one.set["num_virtual_tokens"] for one in tokens) == [5, 6, 7, 8]


def test_a_grid_of_more_than_the_count_is_sampled(raced):
    text = "entries:\n- {method: lora, r: [2, 4, 8, 16, 32], dropout: [0, 0.1, 0.2]}\n- {method: ia3}"
    found = raced(text, 10)
    assert [one.method for one in found].count("ia3") == 1 and len(found) == 10
    assert found[:9] != raced(text)[:9] and len({one.set.get("r", 8) for one in found}) == 5
    assert len(raced(text)) == 16 and len(raced(text, 15)) == 15


def test_a_range_that_holds_few_numbers_gives_those(raced):
    assert len(raced("entries:\n- {method: lora, r: {low: 4, high: 6}}", 20)) == 3


def test_a_missing_optuna_is_named(raced, monkeypatch):
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "optuna" else real(name))
    with pytest.raises(InlayError, match=r"needs optuna, which is not installed. pip install .*'optuna>=4'"):
        raced(RANGES, 8)
    assert len(raced("entries:\n- {method: lora, r: [4, 8]}")) == 2


# ---- seeds and names


def test_seeds_make_twins(raced):
    found = raced("entries:\n- {method: lora, r: [4, 8], lr: 1e-3}", seed=5, seeds=3)
    assert [one.name for one in found][:4] == [
        "lora-r4-1e-3-s5",
        "lora-r4-1e-3-s6",
        "lora-r4-1e-3-s7",
        "lora-r8-1e-3-s5",
    ]
    assert [one.plan(2).seed for one in found] == [5, 6, 7] * 2
    assert [one.twin for one in found] == ["lora-r4-1e-3"] * 3 + ["lora-r8-1e-3"] * 3
    assert found[1].line() == "LoRA r=4 all-linear lr 1e-3 seed 6"


def test_long_and_odd_values_make_names_of_folders(raced):
    text = """
entries:
- method: lora
  targets: [".*\\\\.(q|v)_proj", "a/b c", "A/b c"]
  layers: [[0, 1], "last 1"]
  use_rslora: [true, false]
- {method: compacter++, lr: 3e-3}
"""
    found = raced(text)
    assert len({one.name.lower() for one in found}) == len(found) == 13
    assert all(re.fullmatch(r"\w[\w.+-]{0,66}", one.name, re.ASCII) for one in found)
    assert found[-1].name == "compacter++-3e-3"


def test_a_space_may_name_any_field(raced):
    words = {"method", "rows_below", "usual", "when"}
    for name, kind in METHODS.items():
        own = {field.name for field in fields_of(kind)}
        assert not own & (words | {*COURSE_FIELDS}), name  # a name would say two things
    course = "optimizer: [adamw, sgd], schedule: constant, weight_decay: 0.1, clip: 2, neftune_alpha: 5"
    found = raced(f"entries:\n- {{method: lora, {course}, rank_pattern: {{value: {{q_proj: 4}}}}}}")
    assert found[0].plan(3).method.rank_pattern == {"q_proj": 4} and found[1].plan(3).optimizer == "sgd"


# ---- what is refused

LORA = "entries:\n- {method: lora, "
BAD = {
    "an empty file": ("", r"race.yaml is empty. Give entries"),
    "no mapping": ("- lora\n- ia3", r"race.yaml holds no mapping"),
    "a word": ("lora", r"holds no mapping"),
    "no yaml": ("entries: [", r"cannot be read: .*line 1"),
    "a key twice": ("entries: []\nentries: []", r"line 1: a key is there twice"),
    "no entries": ("contenders: 4", r"the space is empty"),
    "an empty list": ("entries: []", r"the space is empty"),
    "entries in no list": ("entries: {method: lora}", r"entries is no list"),
    "an unknown key": ("entrys: []", r"the key 'entrys' is not known. Did you mean 'entries'\?"),
    "an entry in no mapping": ("entries: [lora]", r"entry 1 is 'lora', which is no mapping"),
    "an entry without a method": ("entries: [{r: 4}]", r"entry 1 names no method"),
    "an unknown method": ("entries: [{method: prefx}]", r"entry 1: no method is called 'prefx'. Did you mean 'pre"),
    "methods in an empty list": ("entries: [{method: []}]", r"no method is called \[\]"),
    "an unknown field": (LORA + "rank: 4}", r"entry 1: lora has no setting 'rank'.*Settings: .*Of the course: "),
    "a field that is no text": (LORA + "4: 4}", r"lora has no setting 4"),
    "another's field": ("entries: [{method: [lora, ia3], r: 4}]", r"ia3 has no setting 'r'"),
    "a course's unknown field": ("course: {r: 4}\n" + LORA + "r: 4}", r"course has no field 'r'. Fields: epochs"),
    "a course in no mapping": ("course: 4\n" + LORA + "r: 4}", r"course is 4, which is no mapping"),
    "a wrong value": (LORA + "r: [4, 0]}", r"entry 1: LoRA's r is 0. Choose a whole number of 1 or more"),
    "a value of another kind": (LORA + "dropout: some}", r"LoRA's dropout is 'some'"),
    "a wrong rate": (LORA + "lr: -1}", r"lr is -1. Choose a number above 0"),
    "no number": (LORA + "lr: .nan}", r"lr is nan"),
    "an unknown name": (LORA + "optimizer: adamx}", r"optimizer 'adamx' is not known. Did you mean"),
    "a value twice": (LORA + "r: [4, 4]}", r"LoRA's r lists 4 twice"),
    "an empty list of values": (LORA + "r: []}", r"LoRA's r is an empty list"),
    "a value that holds itself": (LORA + "targets: &a [*a]}", r"LoRA's targets"),
    "a mapping that says nothing": (LORA + "r: {some: 4}}", r"LoRA's r is {'some': 4}, which says no values. Write"),
    "an empty mapping": (LORA + "r: {}}", r"which says no values"),
    "choices in no list": (LORA + "r: {choices: 4}}", r"choices of LoRA's r are 4"),
    "a range upside down": (LORA + "r: {low: 8, high: 4}}", r"LoRA's r has a range upside down, from 8 to 4"),
    "a range of one number": (LORA + "r: {low: 8, high: 8}}", r"a range of one number, 8"),
    "a range without an end": (LORA + "r: {low: 8}}", r"LoRA's r has a range without high"),
    "a range of words": (LORA + "r: {low: few, high: 9}}", r"low: 'few', which is no number"),
    "a range of truths": (LORA + "r: {low: true, high: 9}}", r"low: True, which is no number"),
    "a range beyond the field": (LORA + "dropout: {low: 0, high: 1}}", r"LoRA's dropout is 1. Choose"),
    "a range of parts of numbers": (LORA + "r: {low: 0.5, high: 9}}", r"LoRA's r is 0.5. Choose a whole number"),
    "a range of no numbers": (LORA + "targets: {low: 1, high: 9}}", r"LoRA's targets has a range, and takes no"),
    "a range in a mapping": (LORA + "rank_pattern: {low: 1, high: 9}}", r"rank_pattern has a range, and takes no"),
    "logarithms of 0": (LORA + "dropout: {low: 0, high: 0.1, log: true}}", r"a range by logarithms from 0. Begin"),
    "a log of words": (LORA + "lr: {low: 1e-4, high: 0.1, log: ja}}", r"lr has log: 'ja'"),
    "log and step": (LORA + "r: {low: 1, high: 9, log: true, step: 2}}", r"LoRA's r has both log and step"),
    "a step of 0": (LORA + "r: {low: 1, high: 9, step: 0}}", r"LoRA's r has step: 0"),
    "a step too wide": (LORA + "r: {low: 1, high: 9, step: 20}}", r"a step of 20, wider than its range"),
    "a step too small": (LORA + "lr: {low: 1, high: 9, step: 1e-9}}", r"lr has more than 1000 steps"),
    "a step between numbers": (LORA + "r: {low: 1, high: 9, step: 0.5}}", r"LoRA's r is 1.5. Choose a whole"),
    "a range's unknown key": (LORA + "r: {low: 1, high: 9, stop: 1}}", r"LoRA's r has the key 'stop'"),
    "a condition on nothing": (LORA + "dropout: {value: 0.1, when: {r: 4}}}", r"condition of dropout names 'r', wh"),
    "a condition that is none": (LORA + "dropout: {value: 0.1, when: r}}", r"the condition of dropout is 'r'"),
    "a condition that never holds": (
        LORA + "r: [4, 8], dropout: {value: 0.1, when: {r: 16}}}", r"condition of dropout never holds: r is never 16",
    ),
    "a condition beyond a range": (
        LORA + "r: {low: 4, high: 8}, dropout: {value: 0.1, when: {r: 16}}}", r"dropout never holds",
    ),
    "a condition of a wrong value": (LORA + "r: [4, 8], dropout: {value: 0.1, when: {r: x}}}", r"LoRA's r is 'x'"),
    "conditions in a circle": (
        LORA + "r: {value: 4, when: {dropout: 0.1}}, dropout: {value: 0.1, when: {r: 4}}}",
        r"the fields r, dropout wait for one another",
    ),
    "a condition without values": (LORA + "r: {when: {dropout: 0.1}}}", r"which says no values"),
    "a tie to nothing": (LORA + "alpha: {times: rank, by: 2}}", r"alpha is tied to 'rank', which is no field of lora"),
    "a tie to itself": (LORA + "alpha: {times: alpha, by: 2}}", r"LoRA's alpha is tied to itself"),
    "a tie to a word": (LORA + "alpha: {times: targets, by: 2}}", r"alpha is tied to 'targets', which is no number"),
    "a tie to no value": (LORA + "r: [4, 8], dropout: {times: alpha, by: 2}}", r"2 times alpha, which is None there"),
    "a tie to no value beside a range": (
        LORA + "lr: {low: 1, high: 2}}\n- {method: lora, r: [4, 8], dropout: {times: alpha, by: 2}}",
        r"entry 2 \(lora\): dropout is 2 times alpha, which is None there",
    ),
    "a tie without its number": (LORA + "alpha: {times: r}}", r"Write {times: FIELD, by: NUMBER}"),
    "a tie of a word": (LORA + "targets: {times: r, by: 2}}", r"LoRA's targets is tied to r, and takes no numbers"),
    "a tie to the usual rate": (LORA + "alpha: {times: usual, by: 2}}", r"Only lr can be so many times it"),
    "a tie beyond the field": (LORA + "dropout: {times: r, by: 1}, r: [4, 8]}", r"LoRA's dropout is 4"),
    "ties in a circle": (LORA + "alpha: {times: r, by: 1}, r: {times: alpha, by: 1}}", r"r wait for one another"),
    "settings that do not fit": (
        "entries: [{method: prefix, init: vocab, prefix_projection: [true, false]}]",
        r"entry 1 \(prefix\): init 'vocab' gives keys",
    ),
    "the race's own steps": (LORA + "steps: 4}", r"a space cannot say steps. All contenders train as long as --budget"),
    "the race's own epochs": ("course: {epochs: 4}\n" + LORA + "r: 4}", r"a space cannot say epochs"),
    "the race's own seed": (LORA + "seed: [1, 2]}", r"a space cannot say seed. --seeds K trains"),
    "one contender": (LORA + "r: 4}", r"holds 1 contender for 5,000 training rows. A race needs two"),
    "none with so many rows": (LORA + "r: [4, 8], rows_below: 9}", r"holds no contenders for 5,000 training rows"),
    "no number of rows": (LORA + "r: [4, 8], rows_below: few}", r"entry 1 has rows_below: 'few'"),
    "a count of one": ("contenders: 1\n" + LORA + "r: [4, 8]}", r"race.yaml: a race of 1 contender is none. Give 2"),
    "a count of words": ("contenders: many\n" + LORA + "r: [4, 8]}", r"contenders is 'many'"),
    "a take of another kind": ("take: last\n" + LORA + "r: [4, 8]}", r"take is 'last'. Write first or spread"),
    "a first of a range": ("take: first\n" + LORA + "r: {low: 4, high: 8}}", r"entry 1 \(lora\) has a range, which"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused(raced, what):
    text, said = BAD[what]
    with pytest.raises(UsageError, match=said) as caught:
        raced(text)
    assert "\n" not in str(caught.value) and "race.yaml" in str(caught.value)


@pytest.mark.parametrize("count", [-1, 0, 1, 1001, 2.5, True])
def test_counts_that_are_no_race(count):
    with pytest.raises(UsageError, match=r"contender"):
        contenders(read_space("default"), count, seed=0, rows=100)


@pytest.mark.parametrize("seeds", [0, -1, 1.5, True])
def test_seeds_that_are_none(seeds):
    with pytest.raises(UsageError, match=r"seeds is"):
        contenders(read_space("default"), None, seed=0, rows=100, seeds=seeds)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("defualt", r"no space is called 'defualt'. Did you mean 'default'\? Spaces: quick, default, wide"),
        ("nothing.yaml", r"there is no file nothing.yaml. Spaces: quick"),
        ("some/where", r"there is no file some/where"),
        (".", r"\. is a folder"),
    ],
)
def test_a_space_that_is_not_there(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        read_space(name)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "race.yaml").write_bytes(b"\xff\xfe\x00entries")
    with pytest.raises(UsageError, match="cannot be read"):
        read_space(str(tmp_path / "race.yaml"))


def test_the_named_spaces_go_along_with_the_package():
    import inlay.race

    assert (Path(inlay.race.__path__[0]) / "spaces" / "wide.yaml").is_file()
