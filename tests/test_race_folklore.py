"""The page of sayings: its words follow from the cells, its intervals cover, and its commands can be typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from inlay.methods.table import METHODS
from inlay.race.contenders import contenders
from inlay.race.space import read_space

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import folklore  # noqa: E402
import folklore_page  # noqa: E402
from folklore_parts import CASES, STREAMS  # noqa: E402
from folklore_sayings import SAYINGS  # noqa: E402

ROWS = 200


def cell(stream, case, seed, share, noise=0.0):
    """A case that is right on a `share` of the rows."""
    hard = (np.arange(ROWS) * 7919 % ROWS) / ROWS
    wobble = noise * np.random.default_rng([seed, len(case)]).standard_normal(ROWS)
    hits = (hard + wobble < share).astype(int).tolist()
    nats = [0.1 if hit else 1.1 for hit in hits]
    return {"kind": stream, "case": case, "seed": seed, "dtype": "torch.float32", "device": "cpu", "scale": 1.0,
            "rate": 1e-3, "trained": 1000, "tried": {}, "hits": hits, "nats": nats}  # fmt: skip


def cells(shares, seeds=(0, 1, 2), noise=0.05):
    return {
        (stream, case, seed): cell(stream, case, seed, shares.get(case, 0.8), noise)
        for stream, own in STREAMS.items() for case in own for seed in seeds
    }  # fmt: skip


def said(title, text):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("says", "words"), [
    ([], "not measured yet"), ([0, 0], "not told apart"), ([1, 1], "held"), ([-1], "the other way round"),
    ([1, 0, 0], "held in 1 of 3, 2 not told apart"), ([1, -1], "held in 1 of 2, the other way round in 1 of 2"),
])  # fmt: skip
def test_outcomes_in_words(says, words):
    assert folklore_page.outcome(says) == words


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Rows, seeds and what is left each move the differences; of 400 intervals 95 % hold the true mean of 0."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        apart = rng.normal(0, 0.4, 100) + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.3, (3, 100))
        found = folklore_page.crossed(apart)
        held += found.low <= 0 <= found.high
    assert held >= 0.92 * 400
    one = folklore_page.crossed(rng.normal(1.0, 0.4, (1, 100)))
    assert one.seeds == 1 and 0.8 < one.low < one.mean < one.high < 1.2
    same = folklore_page.crossed(np.zeros((3, 50)))
    assert (same.low, same.high) == (0, 0) and same.says(1) == 0


def test_words_follow_from_the_cells():
    text = folklore_page.page_text(cells({"r=4": 0.6, "r=64": 0.95, "prefix 20, network": 0.3}), [], [])
    rank = said("A higher rank is better", text)
    assert "By accuracy: held in 2 of 4, 2 not told apart. By the loss: held in 2 of 4, 2 not told apart." in rank
    assert "r=64 against r=8" in rank and "room for a gain of at most" in rank
    assert "By accuracy: the other way round." in said("A prefix needs its network", text)
    assert "| A prefix needs its network | the other way round | the other way round |" in text
    flat = folklore_page.page_text(cells({}, noise=0.0), [], [])
    assert "By accuracy: not told apart. By the loss: not told apart." in said("alpha is to be 2r", flat)


def test_what_is_missing_is_said():
    text = folklore_page.page_text({}, [], [])
    assert text.startswith("No cell of this page is measured yet.") and "By accuracy:" not in text
    assert "Times are not measured yet." in text and text.count("not measured yet") > len(SAYINGS)
    some = cells({}, seeds=(0,))
    del some["rank", "r=16", 0]
    rank = said("A higher rank is better", folklore_page.page_text(some, [], []))
    assert "| r=16 against r=8 | not measured yet" in rank and "| r=32 against r=8 | 0.001 and 0.001 |" in rank


def test_the_share_of_the_rate():
    methods = np.linspace(0, 1, 20)[:, None]
    assert folklore_page.rate_share(np.repeat(methods, 3, 1).tolist()).mean == pytest.approx(0)
    found = folklore_page.rate_share((0 * methods + [[0.0, 1.0, 2.0]]).tolist())
    assert found.low == pytest.approx(1)
    screens = [{"kind": "screen", "case": str(n), "device": "cpu", "dtype": "torch.float32",
                "tried": {"1": n / 100, "2": n / 100 + 1, "3": n / 100 + 2}} for n in range(12)]  # fmt: skip
    text = folklore_page.page_text({}, screens, [])
    assert "That the rate decides more than the method: held." in text and "12 cases of methods.py" in text


def test_prefixes_and_lora_are_timed_in_words():
    usual = {"kind": "time", "seed": 0, "device": "cpu", "dtype": "torch.float32", "base ms a token": 20.0}
    own = {case: ((100.0, 5.0) if case == "r=8" else (150.0, 1.0)) for case in folklore_page.TIMED}
    timed = {
        ("time", case, 0): {**usual, "case": case, "tokens/s": speed, "ms a token": more}
        for case, (speed, more) in own.items()
    }
    text = said("LoRA is better than prefix tuning", folklore_page.page_text(timed, [], []))
    assert "Prefixes of 20 train 1.50 times as fast as LoRA r=8" in text and "4.0 ms less than with LoRA" in text


def test_contenders_of_race_worth_are_read():
    hits = {"lora-r8-3e-4": [1, 0, 1, 1] * 25, "prefix-20-1e-2": [1, 0, 0, 0] * 25}
    races = [{"task": "reviews", "seed": seed, "contenders": {name: {"hits": own} for name, own in hits.items()}}
             for seed in range(3)]  # fmt: skip
    lines = "\n".join(folklore_page.worth(races))
    assert "| lora-r8-3e-4 | 75.0 |  |" in lines and "| prefix-20-1e-2 | 25.0 | −50.0 (" in lines
    assert folklore_page.worth([]) == []


def test_rates_of_the_first_seed_are_those_of_the_others():
    done = cells({}, seeds=(0,))
    for case, rate in (("r=8", 3e-4), ("qv r=8", 1e-4)):
        done[next(key for key in done if key[1] == case)]["rate"] = rate
    assert folklore.rates("dropout", 0, done, {})["dropout 0.1"] == [3e-4]
    assert folklore.rates("targets", 1, done, {})["qv r=8"] == [1e-4] and "r=8" not in folklore.rates(
        "rank", 0, done, {}
    )
    assert folklore.rates("prefix", 0, {}, {"prefix": 0.02})["prefix 5"] == [0.02]


def test_every_case_can_be_made_and_every_pair_is_of_cases():
    for name, settings, _ in CASES.values():
        METHODS[name](**settings)
    for saying in SAYINGS:
        assert all(case in CASES for pair in saying.pairs for case in pair)
        assert all(part in (*STREAMS, "time") for part in saying.stream.split(",") if part)


@pytest.mark.parametrize("saying", SAYINGS, ids=lambda saying: saying.key)
def test_the_spaces_of_the_page_are_races(saying, tmp_path):
    path = tmp_path / f"{saying.key}.yaml"
    path.write_text(saying.space)
    assert len(contenders(read_space(str(path)), None, seed=0, rows=480)) >= 2


def test_the_page_has_its_marks_and_every_saying():
    page = (BENCHMARKS.parent / "docs" / "folklore.md").read_text(encoding="utf8")
    part = page.partition(folklore.BEGIN)[2].partition(folklore.END)[0]
    assert folklore.END in page and all(f"## {saying.title}\n" in part for saying in SAYINGS)


def test_cells_of_a_trial_are_kept_apart(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(cell("rank", "r=8", 0, 0.5) | {"scale": scale}) + "\n" for scale in (1.0, 0.1)))
    assert folklore.read_cells(path, 0.1)["rank", "r=8", 0]["scale"] == 0.1
