"""The board of a race: places, scores with intervals and states as they are while it runs; and what was said before."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

import inlay
from inlay.cli import board as boards
from inlay.cli.app import app
from inlay.cli.board import Board, board
from inlay.evaluation.intervals import mean_interval
from inlay.race.places import line_of, places
from inlay.race.race import race
from inlay.reporting.race_page import race_page
from inlay.training.plan import Plan
from test_crash import reviews  # noqa: F401
from test_race import NINTHS, SPACE, contender, given, quiet


def drawn(found, wide):
    console = Console(width=200 if wide else 80, record=True, highlight=False)
    console.print(board(found, "3 in the stream", wide))
    return console.export_text()


def test_places_are_by_rungs_and_then_by_the_best_score():
    field = [contender("slow", 10, [0.2], r=1), contender("far", 30, [0.5, 0.4], r=2),
             contender("gone", 10, [0.9], r=3, stopped="dropped at rung 1: place 3 of 3"),
             contender("new", 3, [], r=4)]  # fmt: skip
    for own in field:
        own.learner.tokens, own.learner.loss = 100 * own.learner.step, 0.25
    found = places(field, [Plan("waits", inlay.IA3(), steps=90)], NINTHS)
    assert [own.name for own in found] == ["far", "slow", "gone", "new", "waits"]
    assert [own.score for own in found] == [0.4, 0.2, 0.9, None, None]
    nats, tokens, _ = field[1].best.rows[-1].numpy()
    assert found[0].interval == mean_interval(nats, tokens) and found[-1].interval is None
    text = drawn(found, True)
    assert "LoRA r=2 all-linear lr 1e-3" in text and "0.250" in text and "30/90" in text and "3,000" in text
    assert "rung 1: place 3 of 3" in text and "waiting" in text
    narrow = drawn(found, False)
    assert "rung 1: place 3 of 3" in narrow and "LoRA" not in narrow and max(map(len, narrow.splitlines())) <= 80


def test_intervals_are_reckoned_once():
    own, known = contender("a", 10, [0.2]), {}
    own.learner.tokens, own.learner.loss = 10, 0.2
    first = places([own], [], NINTHS, known)[0].interval
    known["a", 1] = (0.0, 9.0)
    assert first is not None and places([own], [], NINTHS, known)[0].interval == (0.0, 9.0)


@pytest.mark.parametrize(("method", "line"), [
    (inlay.LoRA(r=4, alpha=8, dropout=0.1), "LoRA r=4 all-linear alpha=8 dropout=0.1 lr 1e-3"),
    (inlay.PrefixTuning(num_virtual_tokens=10, prefix_projection=True), "Prefix tuning 10 tokens network lr 1e-3"),
    (inlay.IA3(), "IA³ lr 1e-2"),
])  # fmt: skip
def test_settings_in_one_line(method, line):
    assert line_of(Plan("x", method, steps=9)) == line


def test_the_last_turn_has_the_places_of_race_json(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    turns, space = [], SPACE + "  - {method: bitfit, lr: [1.0e-2]}\n"
    settings = given(base_folder, reviews, tmp_path / "run", space, steps=9, at_once=3)
    shown = Board()

    def turn(progress, waiting, shares):
        turns.append(places(progress, waiting, shares))
        shown.turn(progress, waiting, shares)

    result = race(settings, on_message=quiet, on_turn=turn)
    assert [own.state for own in turns[0]] == ["waiting"] * 6 and len(turns[-1]) == 6
    assert [own.name for own in turns[-1]] == [one["name"] for one in result["contenders"]]
    assert turns[-1][0].score >= result["contenders"][0]["choosing"] > 0
    assert [own.state for own in turns[-1]] == [one["status"] for one in result["contenders"]]
    with monkeypatch.context() as patch:
        patch.setattr(boards.console, "width", 100)
        assert shown._table().row_count == 6
    left = [line for line in result["planned"] if line.startswith("left out: bitfit")]
    assert left and any("rungs after" in line for line in result["planned"])
    assert json.loads((tmp_path / "run" / "planned.json").read_text()) == result["planned"]
    assert "left out: bitfit" in race_page(tmp_path / "run", result).replace("<wbr>", "")
    again = race(
        given(base_folder, reviews, tmp_path / "run", space, steps=9, at_once=3, resume=True), on_message=quiet
    )
    assert again["planned"] == result["planned"]


def test_the_command_ends_with_the_advice(base_folder, reviews, tmp_path):  # noqa: F811
    space = tmp_path / "space.yaml"
    space.write_text("entries:\n  - {method: lora, r: [2, 4], lr: 1.0e-2}\n")
    flags = ["--base", base_folder, "--data", reviews, "--out", tmp_path / "run", "--space", space, "--steps", 6]
    flags += ["--batch-size", 4, "--heldout", 0.5, "--verbalizer", "0=negative,1=positive"]
    flags += ["--template", "Review: {text}\\nSentiment:"]
    done = CliRunner().invoke(app, ["race", *map(str, flags)])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "base alone" in text and "times fewer than training all to the end" in text
    assert "is first" in text or "is best" in text
