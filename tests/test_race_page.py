"""The page of a race: the sentence on top is true, what is unknown is a dash, and others' words stay words."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from inlay.evaluation.compare import Comparison, compare
from inlay.evaluation.rows import RowScores
from inlay.race.settings import RaceSettings
from inlay.reporting.race_advice import advice, apart
from inlay.reporting.race_charts import LATENCY, front, scatter
from inlay.reporting.race_effects import effects, pairs
from inlay.reporting.race_entrants import Entrant, Race, read_race
from inlay.reporting.race_page import race_page, write_race_page
from inlay.reporting.race_rows import A_ROW, paired, read_final_rows
from inlay.runs.command import command_parts
from test_report_page import Page

ROWS = 40
SHARES = [1 / 9, 1 / 3, 1.0]


def judged(n, chance, base=0.5):
    """A final row whose right label got so much from the adapter."""
    return {"where": f"a.csv, line {n}", "prompt": f"{n}", "answer": "good", "label": "1",
            "said": str(int(chance > 0.5)), "probabilities": {"0": 1 - chance, "1": chance}, "base_said": "0",
            "base_probabilities": {"0": 1 - base, "1": base}}  # fmt: skip


def contender(name, loss, **more):
    """A contender of race.json; its final rows have losses around `loss`."""
    method = name.partition("-")[0]
    config = {"r": 8, "targets": "all-linear"} if method == "lora" else {}
    return {"name": name, "method": method, "config": config, "lr": 1e-3, "seed": 0, "status": "done", "score": loss,
            "interval": [loss - 0.05, loss + 0.05], "choosing": loss + 0.01, "rungs": 3, "steps": 90, "total_steps": 90,
            "tokens": 9000, "seconds": 9.0, "trainable_parameters": 1000, "file_bytes": 2**20, "virtual_tokens": 0,
            "prefix_tokens": 0, "comparison": versus(loss - math.log(2)), "adapter": name, **more}  # fmt: skip


def versus(difference, half=0.05, rows=ROWS, metric="loss"):
    """A comparison as the record holds it."""
    ends = (difference - half, difference + half)
    better = None if ends[0] <= 0 <= ends[1] else difference < 0
    return {"metric": metric, "difference": difference, "interval": list(ends), "rows": rows, "better": better}


def folder_of(folder, *listed, status="done", winner="", final=True, **more):
    """A race's folder; returns it."""
    shared = {"metric": "loss", "notices": [], "config": {"base": "smollm2", "data": ["a.csv"], "space": "quick"}}
    plans = {own["name"]: {"lr": own["lr"], "method": own["method"], "batch_size": 16} for own in listed}
    result = {"status": status, "metric": "loss", "winner": winner or listed[0]["name"], "base": math.log(2),
              "contenders": listed, "rungs": SHARES, "final_rows": ROWS, "tokens": 0, "seconds": 60.0,
              "whole_tokens": 9000 * len(listed), "notices": [], **more}  # fmt: skip
    (folder / "final").mkdir(parents=True, exist_ok=True)
    (folder / "race.json").write_text(json.dumps(result))
    (folder / "run.json").write_text(json.dumps({**shared, "status": status, "plans": plans, "choosing_rows": 30}))
    lines, generator = [], torch.Generator().manual_seed(1)
    for own in listed:
        noise = 0.02 * torch.randn(ROWS, generator=generator).numpy()
        chances = [math.exp(-own["score"] - float(off)) for off in noise] if own["score"] is not None else []
        if final and chances:
            path = folder / "final" / f"{own['name']}.jsonl"
            path.write_text("".join(json.dumps(judged(n, chance)) + "\n" for n, chance in enumerate(chances)))
        for rung, share in enumerate(SHARES[: own["rungs"] or 0]):
            held = {"heldout": {"loss": (own["choosing"] or 0) + 0.1 * (2 - rung)}}
            step = round(90 * share)
            lines.append({"learner": own["name"], "step": step, "loss": 1 / step, "tokens": 100 * step, **held})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page(folder, **given):
    text = race_page(folder, command=["inlay", "race", "--data", "a b.csv"], **given)
    found = Page(text)
    assert found.tags.count("script") == 1
    own = text.split("</style>")[0] + text.split("<script>")[-1]
    assert not re.search(r"https?:|url\(|@import|//\w+\.\w|fetch\(|XMLHttp", own)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return found


# ---- the sentence on top


def entrant(name, place=1, base=None, winner=None, **more):
    usual = {"method": name.partition("-")[0], "title": name.partition("-")[0].upper(), "line": "", "state": "done",
             "score": 0.4, "interval": [0.3, 0.5], "choosing": 0.41, "rungs": 3, "steps": 90, "total": 90, "lr": 1e-3,
             "parameters": 1000, "seed": 0}  # fmt: skip
    return Entrant(place, name, base=_found(base), winner=_found(winner), **{**usual, **more})


def _found(difference):
    if difference is None or isinstance(difference, Comparison):
        return difference
    given = versus(difference)
    return Comparison("loss", difference, tuple(given["interval"]), ROWS, given["better"])


def said(*entrants, status="done", winner=True, **more):
    found = advice(Race(status, "loss", entrants, entrants[0] if winner and entrants else None, 0.69, ROWS, **more))
    return found.tone, found.words


def test_the_best_is_named_with_its_reason():
    tone, words = said(entrant("lora-a", base=-0.3), entrant("ia3-b", 2, base=-0.01, winner=0.3, steps=10))
    assert tone == "good" and words.startswith(
        "lora-a is best: loss 0.400 (0.30–0.50), better than the base beyond chance (loss −0.300, 95 % interval −0.35 "
        "to −0.25, paired over 40 final rows)."
    )
    assert words.endswith("It is better beyond chance than the other one, as they were when they left.")


def test_one_that_is_much_smaller_and_not_told_apart_is_named():
    small = entrant("ia3-b", 2, base=-0.28, winner=0.02, parameters=25, steps=30)
    _, words = said(entrant("lora-a", base=-0.3), small, entrant("prompt-c", 3, base=0.0, winner=0.3, parameters=5))
    assert "It is better beyond chance than 1 of 2 others." in words
    assert words.endswith(
        "ia3-b, which left after 30 of 90 steps, has 1/40 of its parameters, beats the base too, and is not told from "
        "it (loss +0.020, 95 % interval −0.03 to 0.07)."
    )


@pytest.mark.parametrize("other", [
    {"base": 0.01, "winner": 0.02, "parameters": 25}, {"base": -0.2, "winner": 0.1, "parameters": 25},
    {"base": -0.28, "winner": 0.02, "parameters": 900}, {"base": -0.28, "winner": 0.02, "parameters": None},
    {"base": -0.28, "winner": None, "parameters": 25},
])  # fmt: skip
def test_no_other_is_recommended_that_is_not_both_good_and_small(other):
    """Not better than the base; worse than the winner; as large; of unknown size; not compared."""
    _, words = said(entrant("lora-a", base=-0.3), entrant("ia3-b", 2, **other))
    assert "of its parameters" not in words


def test_a_small_one_with_most_of_the_gain_is_named_as_worse():
    small = entrant("ia3-b", 2, base=-0.28, winner=0.08, parameters=25)
    _, words = said(entrant("lora-a", base=-0.3), small, entrant("prompt-c", 3, base=-0.2, winner=0.1, parameters=5))
    assert words.endswith(
        "ia3-b has 1/40 of its parameters and 93 % of its gain over the base, though it is worse beyond chance (loss "
        "+0.080, 95 % interval 0.03–0.13)."
    )


def test_nobody_told_apart_is_said():
    others = [entrant(f"lora-{n}", n, base=-0.3, winner=0.01, lr=n) for n in (2, 3)]
    assert said(entrant("lora-a", base=-0.3), *others)[1].endswith(
        "None of the 2 others is told from it beyond chance."
    )
    assert "The other one is not told from it" in said(entrant("lora-a", base=-0.3), others[0])[1]


def test_one_that_the_choosing_rows_put_lower_may_score_better():
    _, words = said(entrant("lora-a", base=-0.3), entrant("ia3-b", 2, base=-0.5, winner=-0.2))
    assert "On the final rows ia3-b is better still beyond chance (loss −0.200" in words


def test_other_seeds_are_told_and_are_no_others():
    twins = [entrant(f"lora-s{n}", n + 1, base=-0.3, winner=0.2, seed=n, score=0.4 + n / 10) for n in (1, 2)]
    _, words = said(entrant("lora-s0", base=-0.3), *twins)
    assert words.endswith("With other seeds the same settings have 0.500 and 0.600.") and "others" not in words


def test_nothing_beats_the_base():
    assert said(entrant("lora-a", base=-0.01), entrant("ia3-b", 2, base=0.2)) == (
        "even", "Nothing beats the base beyond chance: lora-a is first with loss 0.400 (0.30–0.50); the base has 0.690 "
        "(loss −0.010, 95 % interval −0.06 to 0.04, paired over 40 final rows).",
    )  # fmt: skip
    tone, words = said(entrant("lora-a", base=0.3))
    assert tone == "bad" and "even lora-a, which is first, is worse than it beyond chance" in words


def test_another_that_beats_the_base_is_one_of_many_comparisons():
    tone, words = said(entrant("lora-a", base=-0.01), entrant("ia3-b", 2, base=-0.2), entrant("x-c", 3))
    assert tone == "even" and "Nothing" not in words and "is best" not in words
    assert (
        "On the final rows ia3-b (loss −0.200, 95 % interval −0.25 to −0.15) is better than the base; among 2" in words
    )


def test_few_rows_and_no_rows_give_no_verdict():
    few = Comparison("loss", -0.3, (-0.4, -0.2), 5, None)
    assert said(entrant("lora-a", base=few))[1].startswith("5 final rows are too few to tell whether lora-a")
    tone, words = said(entrant("lora-a"))
    assert tone == "even" and "No final rows compare it with the base" in words and "best" not in words


def test_all_diverged_names_the_rates_to_try():
    gone = {"state": "diverged at step 3", "choosing": None, "score": None}
    found = [
        entrant("lora-a", lr=1e-2, **gone),
        entrant("lora-b", 2, lr=3e-3, **gone),
        entrant("ia3-c", 3, lr=3, **gone),
    ]
    tone, words = said(*found, winner=False)
    assert tone == "bad" and words == (
        "All 3 contenders diverged. Try lower rates: LORA 1e-3, IA3 1e0; or --warmup 0.1."
    )
    mixed = [found[0], entrant("lora-d", 2, choosing=None)]
    assert "1 of 2 diverged" in said(*mixed, winner=False)[1]


def test_a_race_that_goes_on_has_a_leader_and_no_best():
    rungs = SHARES
    tone, words = said(entrant("lora-a", rungs=1, base=-0.3), status="running", rungs=rungs)
    assert tone == "even" and words == (
        "The race is running: lora-a leads after rung 1 of 3 with loss 0.410 on the choosing rows. No final row is "
        "read yet."
    )
    assert said(entrant("lora-a", choosing=None), status="running")[1].endswith("has come to a rung yet.")
    assert "--resume" in said(entrant("lora-a"), status="interrupted")[1]


def test_of_accuracy_more_is_better():
    found = Comparison("accuracy", 0.2, (0.1, 0.3), ROWS, True)
    assert apart(found) == "accuracy +0.200, 95 % interval 0.10–0.30" and Race("done", "accuracy", ()).higher


# ---- pairs of final rows


@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\x1c", "\r"])
def test_rows_may_hold_characters_that_part_lines_elsewhere(odd, tmp_path):
    rows = [judged(n, 0.8) | {"prompt": f"a{odd}b {n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    found = read_final_rows(tmp_path / "a.jsonl")
    assert found is not None and len(found.keys) == 3


def test_pairs_are_those_of_the_record(tmp_path):
    chances = [[0.9, 0.4, 0.6] * 5, [0.7, 0.5, 0.2] * 5]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    whole = []
    for path, own in zip(files, chances, strict=True):
        path.write_text("".join(json.dumps(judged(n, chance)) + "\n" for n, chance in enumerate(own)))
        logs = torch.tensor([[1 - chance, chance] for chance in own], dtype=torch.float64).log().numpy()
        whole.append(RowScores.of_labels(range(15), [1] * 15, logs, ["0", "1"]))
    first, second = map(read_final_rows, files)
    for metric in ("loss", "accuracy", "f1"):
        found, wanted = paired(first, second, metric), compare(*whole, metric)
        assert (found.metric, found.rows, found.better) == (metric, 15, wanted.better)
        assert (found.difference, *found.interval) == pytest.approx((wanted.difference, *wanted.interval)), metric
    assert paired(first, second, "span_f1").metric == "loss"
    files[1].write_text("".join(files[1].read_text().splitlines(keepends=True)[:-1]))
    assert paired(first, read_final_rows(files[1]), "loss") is None
    files[1].write_text("{half a line")
    assert read_final_rows(files[1]) is None and read_final_rows(tmp_path / "none") is None


def test_rows_without_tokens_are_compared_as_rows_and_say_so(tmp_path):
    files = []
    for name, loss in (("a", 0.5), ("b", 0.7)):
        files.append(tmp_path / name)
        rows = [
            {"where": f"{n}", "loss": loss + n / 100, "exact": n % 2 == 0, "tokens": 1 + n, "hits": n}
            for n in range(12)
        ]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    weighed = paired(*map(read_final_rows, files), "loss")
    assert weighed.metric == "loss" and weighed.difference == pytest.approx(-0.2) and weighed.better is True
    for path in files:
        path.write_text(re.sub(r', "tokens": \d+, "hits": \d+', "", path.read_text()))
    assert paired(*map(read_final_rows, files), "perplexity").metric == A_ROW
    assert paired(*map(read_final_rows, files), "exact_match").metric == "exact_match"


# ---- what settings did


def four(tmp_path):
    """Two ranks by two rates of LoRA, whose alpha goes with the rank, and an IA³."""
    listed = []
    for r in (4, 16):
        for lr in (1e-3, 1e-4):
            loss = 0.4 + 0.1 * (lr < 1e-3)
            config = {"r": r, "alpha": 2 * r, "targets": "all-linear"}
            listed.append(contender(f"lora-r{r}-{lr:g}", loss, config=config, lr=lr, trainable_parameters=100 * r))
    return folder_of(tmp_path, *listed, contender("ia3-a", 0.6, trainable_parameters=50))


def race_of(folder):
    read = [json.loads((folder / name).read_text()) for name in ("race.json", "run.json")]
    return read_race(folder, *read)


def test_settings_are_grouped_and_those_that_go_together_are_one(tmp_path):
    found = {effect.setting: effect.groups for effect in effects(race_of(four(tmp_path)))}
    assert [*found] == ["method", "LoRA: learning rate", "LoRA: r, alpha"]
    assert [(group.value, group.count) for group in found["LoRA: r, alpha"]] == [("4, 8", 2), ("16, 32", 2)]
    low, high = found["LoRA: learning rate"]
    assert (low.value, low.first, low.best, high.value, high.first) == ("1e-4", "0.710", "0.500", "1e-3", "0.610")
    assert low.evidence.startswith("two contenders") and found["method"][1].evidence == "one contender"


def test_pairs_differ_in_one_setting(tmp_path):
    found = [*pairs(race_of(four(tmp_path)))]
    assert [(pair.setting, pair.change) for pair in found] == [
        ("LoRA: learning rate", "1e-4 → 1e-3"), ("LoRA: learning rate", "1e-4 → 1e-3"),
        ("LoRA: r, alpha", "4, 8 → 16, 32"), ("LoRA: r, alpha", "4, 8 → 16, 32"),
    ]  # fmt: skip
    assert [pair.found.better for pair in found] == [True, True, None, None]
    assert found[0].found.difference == pytest.approx(-0.1, abs=0.02) and found[0].steps == (90, 90)


# ---- the picture


def test_the_front_holds_those_that_no_other_beats_for_less():
    made = [entrant("a", score=0.5, parameters=10), entrant("b", 2, score=0.6, parameters=20),
            entrant("c", 3, score=0.3, parameters=30), entrant("d", 4, score=0.3, parameters=40),
            entrant("e", 5, score=None, parameters=1), entrant("f", 6, score=0.1, parameters=None)]  # fmt: skip
    race = Race("done", "loss", made, made[2])
    assert [own.name for own in front(race)] == ["a", "c"]
    assert [own.name for own in front(replace(race, metric="accuracy"))] == ["a", "b"]
    assert scatter(race).count("<circle") == 4 and scatter(Race("done", "loss", made[4:])) == ""


def test_latency_has_a_front_of_its_own_and_those_that_were_not_measured_are_left_out():
    costs = [(0.5, 10, 3.0), (0.6, 20, -0.1), (0.3, 30, None), (0.4, 40, 9.0)]
    made = [
        entrant("abcd"[n], n + 1, score=score, parameters=size, token_ms=ms)
        for n, (score, size, ms) in enumerate(costs)
    ]
    race = Race("done", "loss", made, made[3])
    assert [own.name for own in front(race, LATENCY)] == ["b", "a", "d"]
    assert [own.name for own in front(race)] == ["a", "c"]
    assert scatter(race, LATENCY).count("<circle") == 3 and "+3 ms a token" in scatter(race, LATENCY)
    assert scatter(Race("done", "loss", made[2:3]), LATENCY) == ""


@pytest.mark.parametrize("scores", [[0.4] * 48, [0.01, 40.0, 0.5], [0.0, 0.5], [-1.0, 0.5], [0.7]])
def test_all_points_and_labels_stay_in_the_picture(scores):
    made = [entrant(f"m{n}", n + 1, score=score, interval=[score - 0.2, score + 0.2]) for n, score in enumerate(scores)]
    root = ElementTree.fromstring(scatter(Race("done", "loss", made, made[0], 0.5)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for part in root.iter():
        for name in ("x", "cx", "x1", "x2"):
            assert 0 <= float(part.attrib.get(name, 0)) <= width
        for name in ("y", "cy", "y1", "y2"):
            assert 0 <= float(part.attrib.get(name, 0)) <= height
    assert [part.text for part in root.iter("text") if part.attrib.get("class") == "place"] == [
        str(n + 1) for n in range(len(scores))
    ]


# ---- the page


def test_a_page_tells_the_race(tmp_path):
    left = {"status": "dropped at rung 1: place 3 of 3", "rungs": 1, "steps": 10, "tokens": 1000}
    folder = folder_of(
        tmp_path, contender("lora-a", 0.4), contender("ia3-b", 0.5, prefix_tokens=20),
        contender("prompt-c", 0.7, virtual_tokens=10, **left), notices=["one <b>note</b>"],
    )  # fmt: skip
    (tmp_path / "adapter").mkdir()
    found = page(folder)
    for wanted in (
        "Race of 3 contenders on SmolLM2-135M-Instruct", "lora-a is best: loss 0.400 (0.35–0.45)",
        "r=8 all-linear, lr 1e-3", "dropped at rung 1: place 3 of 3", "1, 1/9 of the course", "3, the end", "1.0 MB",
        "20 keys", "10 of 90",
        "19,000", "27,000", "Times fewer1.4", "inlay predict --base smollm2 --adapter", "inlay race --data 'a b.csv'",
        "here are 5", "one <b>note</b>", "Loss is of 40 final rows", "the base has 0.693", "on 30 choosing rows",
    ):  # fmt: skip
        assert wanted in found.said.replace("\u200b", ""), wanted
    assert "race.json" in found.links and "adapter/" in found.links
    assert [title for title, _ in found.charts][-2:] == ["Training loss", "Loss on 30 choosing rows"]
    assert write_race_page(folder, json.loads((folder / "race.json").read_text())).name == "report.html"


def test_a_page_tells_what_a_token_takes_or_why_it_does_not(tmp_path):
    listed = [contender("lora-a", 0.4, token_ms=2.345, token_ms_quartiles=[2.1, 2.6]), contender("ia3-b", 0.5)]
    found = page(folder_of(tmp_path, *listed, base_token_ms=21.08))
    for wanted in (
        "+2.35",
        "2.10–2.60",
        "which takes 21.1 ms",
        "against latency a token",
        "others as a twent",
    ):
        assert wanted in found.said, wanted
    assert "loss against ms a token more than the base" in found.text and "against trained parameters" in found.said
    why = "this base cannot generate here (no cache)"
    said = page(folder_of(tmp_path, contender("lora-a", 0.4), latency_unmeasured=why)).said
    assert f"The time of a decoded token is not measured: {why}." in said and "against latency" not in said


def test_names_from_files_stay_words(tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>"
    listed = [contender("a", 0.4, status=f"stopped {nasty}", method=nasty), contender("b", 0.5, config={nasty: nasty})]
    found = page(folder_of(tmp_path, *listed, final=False, status=nasty, notices=[nasty]))
    assert "img" not in found.tags and nasty in found.said
    text = (tmp_path / "race.json").read_text().replace('"a"', json.dumps(nasty.replace("/", "")))
    (tmp_path / "race.json").write_text(text)
    assert "img" not in page(tmp_path).tags


def test_what_is_unknown_is_a_dash(tmp_path):
    bare = {"name": "x", "method": "lora"}
    (tmp_path / "race.json").write_text(json.dumps({"contenders": [bare], "winner": None}))
    found = page(tmp_path)
    cells = re.findall(r'<td class="n">([^<]*)', found.text)
    assert cells and {*cells} <= {"–", "1"} and "lr –" in found.said
    assert page(tmp_path, result={}).said.count("names no contender") == 1


def test_a_race_that_goes_on_has_a_page(tmp_path):
    waits = {"score": None, "interval": None, "comparison": None, "status": "waiting", "tokens": None, "steps": None}
    late = {"rungs": 0, "choosing": None, "trainable_parameters": None}
    listed = [contender("lora-a", 0.4, **waits), contender("ia3-b", 0.5, **waits | {"rungs": 1})]
    folder_of(tmp_path, *listed, contender("prompt-c", 0.6, **waits | late), status="running", base=None, final_rows=0)
    stop = {"ia3-b": "dropped at rung 1: place 2 of 2"}
    events = [{"turn": 0, "event": "select", "stop": {}, "start": ["lora-a", "ia3-b"]}]
    events.append({"turn": 9, "event": "select", "stop": stop, "start": []})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"turn')
    found = page(tmp_path, result=json.loads((tmp_path / "race.json").read_text()))
    assert "The race is running: lora-a leads after rung 3 of 3" in found.said
    assert "dropped at rung 1: place 2 of 2" in found.said and "is best" not in found.said
    assert (
        "1,000" in found.said and "Times fewer" not in found.said and "Which differences are chance" not in found.said
    )
    assert "inlay merge" not in found.said


def test_while_it_goes_on_events_say_who_left_and_who_came_back(tmp_path):
    bare = {"status": "running", "score": None, "steps": None, "tokens": None, "rungs": 0}
    listed = [contender(f"lora-{name}", 0.4, **bare) for name in "abcd"] + [
        contender("ia3-e", 0.4, **bare | {"rungs": 3})
    ]
    folder_of(tmp_path, *listed, status="running", final=False)
    asks = [("stop", "lora-a"), ("continue", "lora-b"), ("stop", "lora-d"), ("stop", "ia3-e")]
    stop = {"lora-b": "dropped at rung 1: place 2 of 3", "lora-c": "dropped at rung 1: place 3 of 3"}
    events = [{"event": "select", "stop": {}, "start": ["lora-a", "lora-b", "lora-c", "ia3-e"]},
              {"event": "select", "stop": stop, "start": []},
              *({"event": "ask", "what": what, "name": name} for what, name in asks)]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert {own.name: own.state for own in race_of(tmp_path).entrants} == {
        "lora-a": "stopped by hand", "lora-b": "running", "lora-c": stop["lora-c"], "lora-d": "running",
        "ia3-e": "done",
    }  # fmt: skip


def test_the_command_repeats_the_race():
    given = {"base": "smollm2", "data": ["a b.csv"], "out": "runs/x", "space": "quick", "budget": "2M", "contenders": 4}
    assert command_parts({"config": given}, command="race", kind=RaceSettings) == [
        "inlay", "race", "--data", "a b.csv", "--out", "runs/x", "--budget", "2M", "--space", "quick",
        "--contenders", "4",
    ]  # fmt: skip
