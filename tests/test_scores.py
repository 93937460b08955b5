"""Scores are of rows that chose nothing, intervals hold what they say, and words are no stronger than they are."""

from __future__ import annotations

import json

import numpy as np
import pytest

import inlay
from inlay.data.encode import PIECE
from inlay.errors import UsageError
from inlay.evaluation.compare import compare
from inlay.evaluation.intervals import intervals, mean_interval, student, tail, wilson
from inlay.evaluation.rows import Confusion, RowScores
from inlay.evaluation.score import Scored
from inlay.reporting.race_rows import read_final_rows
from inlay.runs.outcome import Final
from inlay.runs.run import run
from test_crash import reviews, settings  # noqa: F401


def tokens(nats, counts=None, hits=None):
    counts = np.ones(len(nats), np.int64) if counts is None else counts
    return RowScores(np.arange(len(nats)), np.asarray(nats, np.float64), counts, counts if hits is None else hits)


def labelled(right, said, labels="ab"):
    many = len(labels)
    shares = np.full((len(right), many), 0.1)
    shares[np.arange(len(said)), said] = 1 - 0.1 * (many - 1)
    return RowScores.of_labels(range(len(right)), right, np.log(shares), tuple(labels))


# ---- metrics of rows


def test_labels_are_counted_as_they_stand():
    rows = labelled([0, 0, 0, 1, 1], [0, 0, 1, 1, 0])
    assert rows.confusion == Confusion(["a", "b"], [[2, 1], [1, 1]])
    scores = rows.scores()
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 4) / 2)
    assert scores["loss"] == pytest.approx(-(3 * np.log(0.9) + 2 * np.log(0.1)) / 5)
    assert rows.probabilities is not None and rows.probabilities.sum(1) == pytest.approx(np.ones(5))


def test_labels_without_a_row_do_not_count_in_f1():
    assert labelled([0, 1, 0], [0, 1, 0], "abc").scores()["f1"] == 1
    assert labelled([0, 0], [2, 2], "abc").scores()["f1"] == 0


def test_pieces_of_a_row_are_one_row():
    rows = RowScores.of_tokens([7, 3, 3, 5], [1.0, 2.0, 4.0, 1.0], [2, 3, 4, 1], [2, 3, 1, 1])
    assert rows.samples.tolist() == [7, 3, 5]
    assert rows.nats.tolist() == [1, 6, 1] and rows.tokens.tolist() == [2, 7, 1] and rows.hits.tolist() == [2, 4, 1]
    assert rows.scores()["loss"] == pytest.approx(0.8) and rows.scores()["exact_match"] == pytest.approx(2 / 3)


# ---- intervals


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423), (999, 1.9623), (5000, 1.9604)],
)
def test_students_quantiles(freedom, value):
    assert student(freedom) == pytest.approx(value, abs=2e-4)


def test_wilson_is_the_textbooks():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_few_rows_get_wider_tails():
    assert tail(10) < tail(100) < tail(10_000) < 0.025


@pytest.mark.parametrize("rows", [5, 12, 60])
def test_intervals_of_a_mean_hold_it_about_as_often_as_they_say(rows):
    rng = np.random.default_rng(rows)
    held = 0
    for _ in range(300):
        weights = rng.integers(1, 6, rows)
        found = mean_interval(weights * (2.0 + rng.normal(size=rows)), weights)
        assert found is not None
        held += found[0] <= 2.0 <= found[1]
    assert 0.90 <= held / 300 <= 0.995


def test_intervals_of_f1_hold_it():
    rng = np.random.default_rng(0)
    table = np.array([[0.4, 0.1], [0.2, 0.3]])
    truth = (2 * 0.4 / (0.5 + 0.6) + 2 * 0.3 / (0.5 + 0.4)) / 2
    held = 0
    for _ in range(200):
        cells = rng.choice(4, 80, p=table.reshape(-1))
        found = intervals(labelled(cells // 2, cells % 2))["f1"]
        assert found is not None
        held += found[0] <= truth <= found[1]
    assert 0.90 <= held / 200 <= 0.995


def test_many_rows_are_as_quick_and_as_right():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 200_000)
    found = mean_interval(values, np.ones(200_000))
    assert found is not None
    exact = 1.96 * values.std() / np.sqrt(200_000)
    assert (found[1] - found[0]) / 2 == pytest.approx(exact, rel=0.1)


def test_a_perfect_score_of_few_rows_is_not_a_sure_one():
    for rows in (labelled([0, 1] * 4, [0, 1] * 4), tokens(np.full(8, 0.1))):
        found = intervals(rows)["accuracy"]
        assert found is not None and found[0] < 0.7 and found[1] == 1
    assert intervals(labelled([0, 1] * 4, [0, 1] * 4))["f1"] == pytest.approx(wilson(8, 8))


def test_what_allows_no_interval_has_none():
    assert intervals(tokens([1.0]))["loss"] is None and intervals(tokens([1.0]))["exact_match"] is not None
    assert intervals(tokens([1.0, np.nan, 2.0]))["loss"] is None
    assert intervals(labelled([0], [0]))["f1"] is None


def test_a_loss_is_never_below_zero():
    found = intervals(tokens([0.0, 0.0, 3.0]))
    assert found["loss"] is not None and found["loss"][0] == 0
    assert found["perplexity"] is not None and found["perplexity"][0] == 1


# ---- comparisons


def test_pairs_tell_what_means_cannot():
    rng = np.random.default_rng(0)
    base = np.abs(rng.normal(3, 2, 40)) + 1
    better = compare(tokens(base - 0.1 + 0.01 * rng.normal(size=40)), tokens(base), "loss")
    assert better.better is True and better.interval is not None and better.interval[1] < 0
    assert compare(tokens(base), tokens(base - 0.1), "perplexity").better is False
    assert compare(tokens(base), tokens(rng.permutation(base)), "loss").better is None


def test_higher_is_better_where_it_is():
    right = [0, 1] * 20
    good, bad = labelled(right, right), labelled(right, [0] * 40)
    for metric in ("accuracy", "f1"):
        assert compare(good, bad, metric).better is True and compare(bad, good, metric).better is False
        assert compare(good, good, metric).better is None
    assert compare(good, bad, "accuracy").difference == 0.5


@pytest.mark.parametrize("rows", range(2, 10))
def test_fewer_than_ten_rows_give_no_verdict(rows):
    base = np.full(rows, 3.0)
    found = compare(tokens(base - 1 - 0.01 * np.arange(rows)), tokens(base), "loss")
    assert found.better is None and found.rows == rows and found.interval is not None and found.interval[1] < 0


def test_four_rows_of_four_may_be_chance():
    right = [0] * 12
    found = compare(labelled(right, right), labelled(right, [1] * 4 + [0] * 8), "accuracy")
    assert found.better is None and found.interval is not None and found.interval[0] == 0
    assert compare(labelled(right, right), labelled(right, [1] * 8 + [0] * 4), "accuracy").better is True


def test_other_rows_are_refused():
    with pytest.raises(UsageError, match="different rows"):
        compare(tokens([1.0, 2.0]), tokens([1.0, 2.0, 3.0]), "loss")


def test_equal_adapters_are_found_different_once_in_twenty():
    rng = np.random.default_rng(5)
    said = 0
    for _ in range(300):
        base = rng.normal(2, 1, 30)
        said += compare(tokens(base + 0.2 * rng.normal(size=30)), tokens(base), "loss").better is not None
    assert said / 300 < 0.10


# ---- words


def final(own, base, metric="loss"):
    return Final({"it": Scored(own), None: Scored(base)}, "it", metric)


def test_a_worse_adapter_is_called_worse_and_an_equal_one_no_better():
    base = np.linspace(1, 3, 40)
    assert "is worse than the base on the 40 final rows (loss +0.2" in final(tokens(base + 0.2), tokens(base)).notice()
    shaken = base + 0.1 * np.random.default_rng(0).normal(size=40)
    assert "is no better than the base on the 40 final rows (loss" in final(tokens(shaken), tokens(base)).notice()
    assert final(tokens(base - 0.2), tokens(base)).notice() == ""
    assert "6 final rows are too few" in final(tokens(base[:6] - 0.2), tokens(base[:6])).notice()
    assert Final({}, "it", "loss").notice() == "" and Final({}, "it", "loss").result()["final_rows"] == 0


# ---- a run's


@pytest.fixture(scope="module")
def ended(base_folder, reviews, tmp_path_factory):  # noqa: F811
    out, said = tmp_path_factory.mktemp("scores") / "run", []
    result = run(settings(base_folder, reviews, out, heldout="0.5", steps=60, lr=2e-2), on_message=said.append)
    return out, result, said


def test_a_result_has_counts_intervals_and_a_comparison(ended):
    _, result, _ = ended
    assert result["choosing_rows"] == result["final_rows"] == 10
    for name in ("heldout", "heldout_base"):
        for metric, value in result[name].items():
            low, high = result[f"{name}_intervals"][metric]
            assert low <= value <= high and low < high
    told = result["comparison"]
    assert told["metric"] == "loss" and told["rows"] == 10 and told["better"] is True
    assert told["difference"] == pytest.approx(result["heldout"]["loss"] - result["heldout_base"]["loss"])


def test_final_rows_are_told_one_by_one(ended, reviews):  # noqa: F811
    out, result, _ = ended
    lines = [json.loads(line) for line in (out / "final.jsonl").read_text().splitlines()]
    story = json.loads((out / "run.json").read_text())
    assert len(lines) == 10 and len({line["where"] for line in lines}) == 10
    assert sum(line["said"] == line["label"] for line in lines) / 10 == pytest.approx(result["heldout"]["accuracy"])
    assert sum(line["base_said"] == line["label"] for line in lines) / 10 == result["heldout_base"]["accuracy"]
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1) and set(line["base_probabilities"]) == {"0", "1"}
        assert line["prompt"].startswith("Review: a ") and line["answer"] in ("negative", "positive")
        text = line["prompt"].removeprefix("Review: ").removesuffix("\nSentiment:")
        number = int(line["where"].rpartition("line ")[2])
        assert reviews.read_text().splitlines()[number - 1] == f'"{text}",{line["label"]}'
    loss = -np.mean([np.log(line["probabilities"][line["label"]]) for line in lines])
    assert loss == pytest.approx(result["heldout"]["loss"], abs=1e-6)
    assert story["result"] == result and story["data"]["final_rows"] == 10


def test_rows_that_choose_are_not_those_at_the_end(ended):
    out, *_ = ended
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = [line["heldout"]["loss"] for line in metrics if "heldout" in line]
    assert json.loads((out / "run.json").read_text())["result"]["heldout"]["loss"] not in scored


def test_text_rows_have_losses_of_their_own(base_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"question {n}", "completion": f" answer {n % 3}"} for n in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    given = {"template": None, "verbalizer": None, "heldout": "0.5", "lr": 1e-30}
    said = []
    result = run(settings(base_folder, data, tmp_path / "run", **given), on_message=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "final.jsonl").read_text().splitlines()]
    both = {"loss", "exact", "hits", "base_loss", "base_exact", "base_hits"}
    assert {*lines[0]} == {"where", "prompt", "answer", "tokens"} | both
    again = read_final_rows(tmp_path / "run" / "final.jsonl")
    assert again is not None and again.scores.scores() == pytest.approx(result["heldout"])
    assert lines[0]["prompt"].startswith("question") and lines[0]["answer"].startswith("answer")
    assert sum(line["exact"] for line in lines) / 10 == result["heldout"]["exact_match"]
    assert any("no better than the base on the 10 final rows" in line for line in said)
    assert any("no better" in line for line in json.loads((tmp_path / "run" / "run.json").read_text())["notices"])


def test_long_texts_are_judged_whole(base_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{n} a good film " * 30}) for n in range(12)))
    given = {"template": None, "verbalizer": None, "heldout": "0.5", "max_length": 32}
    result = run(settings(base_folder, data, tmp_path / "run", **given), on_message=lambda line: None)
    lines = (tmp_path / "run" / "final.jsonl").read_text().splitlines()
    assert result["final_rows"] == len(lines) == 3 and result["rows"]["rows"] == 6
    assert PIECE == 40


@pytest.mark.parametrize(("heldout", "choosing", "final"), [("0", 0, 0), ("0.03", 0, 1), ("0.05", 1, 1), ("0.2", 4, 4)])
def test_few_rows_still_work_and_are_called_few(heldout, choosing, final, base_folder, reviews, tmp_path):  # noqa: F811
    said = []
    given = {"heldout": heldout, "eval_every": 1, "lr": 0.2, "steps": 30}
    result = run(settings(base_folder, reviews, tmp_path / "run", **given), on_message=said.append)
    assert (result["choosing_rows"], result["final_rows"]) == (choosing, final)
    assert any("too few" in line for line in said) == (heldout != "0")
    assert not any("overfitting" in line for line in said)
    assert (tmp_path / "run" / "final.jsonl").exists() == (final > 0)
    assert (result["comparison"] is None) == (final == 0)


def test_adapters_can_be_compared_row_by_row_in_python(ended, base_folder, reviews):  # noqa: F811
    import transformers as tf

    from inlay.data.encode import Encoder
    from inlay.data.table import read_table
    from inlay.data.template import Template
    from inlay.evaluation.score import score_rows
    from inlay.runtime.memory import TokenBudget

    out, *_ = ended
    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    bank.load("a", out / "adapter")
    template = Template("label", "Review: {text}\nSentiment:", "label", {"0": ["negative"], "1": ["positive"]})
    encoder = Encoder(tf.AutoTokenizer.from_pretrained(base_folder), template, 64)
    found = score_rows(bank, encoder, read_table(reviews).rows, [None, "a"], TokenBudget(4096))
    assert compare(found["a"].rows, found[None].rows, "accuracy").better is True
    assert found["a"].intervals["accuracy"] == wilson(int(found["a"].rows.hits.sum()), 40)
