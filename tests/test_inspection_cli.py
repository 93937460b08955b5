"""`inlay inspect` from end to end on a tiny base: runs' folders, rows, the one JSON object, wrong use."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from inlay.cli.app import app
from test_crash import reviews  # noqa: F401

WORDS = ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive"]


@pytest.fixture(scope="module")
def trained(base_folder, reviews, tmp_path_factory):  # noqa: F811
    """The runs' folders of a few methods, by name."""
    folder = tmp_path_factory.mktemp("runs")
    for method, more in {
        "lora": ["--lr", "2e-2"],
        "prompt": ["--set", "init=vocab"],
        "prefix": [],
        "houlsby": [],
    }.items():
        call(
            "train", "--base", base_folder, "--data", reviews, "--out", folder / method, *WORDS, "--epochs", 3,
            "--heldout", "0.2", "--dtype", "float32", "--batch-size", 8, "--method", method, *more,
        )  # fmt: skip
    return folder


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def looked_at(*arguments):
    lines = call("inspect", *arguments, "--json").stdout.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_a_lora_with_rows(trained, base_folder, reviews):  # noqa: F811
    found = looked_at("--adapter", trained / "lora", "--base", base_folder, "--data", reviews, "--limit", 20)
    assert found["rows"] == 20
    assert [one["rank"] for one in found["ranks"]] == [4, 2, 1]
    assert [one["layer"] for one in found["layers"]] == ["0", "1"]
    assert 0 < found["modules_summary"]["effective_rank"] <= 8
    assert found["scores"]["adapter"]["loss"] < found["scores"]["base"]["loss"]
    assert found["moved_words"]["gained"][0]["adapter"] > found["moved_words"]["gained"][0]["base"]
    assert 0 <= found["calibration"]["adapter"] <= 1
    assert {one["about"] for one in found["findings"]} >= {"score", "size", "rank", "layers", "calibration"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_followed_from_the_start_of_their_run(method, trained, base_folder, reviews):  # noqa: F811
    found = looked_at("--adapter", trained / method, "--base", base_folder, "--data", reviews, "--limit", 8)
    tokens = found["virtual"][0]["tokens"]
    assert len(tokens) == 20
    assert all(0 < token["moved"] < 5 for token in tokens)
    assert all(len(token["nearest"]) == 5 and token["removed"]["interval"] for token in tokens)
    assert isinstance(found["writes_alone"], str)
    assert sum(token["attention"]["share"] for token in tokens) == pytest.approx(found["attention"]["all"])
    assert not any("not known" in note for note in found["notes"])


def test_an_adapter_that_was_carried_away_does_not_know_its_start(trained, base_folder, tmp_path):
    away = tmp_path / "away"
    (trained / "prompt" / "adapter").rename(away)
    try:
        found = looked_at("--adapter", away, "--base", base_folder)
    finally:
        away.rename(trained / "prompt" / "adapter")
    assert all(token["moved"] is None for token in found["virtual"][0]["tokens"])
    assert "is not known" in " ".join(found["notes"])


def test_people_read_words_and_tables(trained, base_folder, reviews, tmp_path):  # noqa: F811
    plain = call("inspect", "--adapter", trained / "houlsby", "--base", base_folder).stdout
    assert "give --data" in plain
    given = ["--adapter", trained / "houlsby", "--base", base_folder, "--data", reviews, "--limit", 12]
    told = call("inspect", *given, "--html", tmp_path / "page.html").stdout
    assert "Houlsby" in (tmp_path / "page.html").read_text(encoding="utf8")
    assert "units" in told
    assert "each layer left out alone" in told


def test_two_adapters_are_compared(trained, base_folder, reviews, tmp_path):  # noqa: F811
    given = ["--adapter", trained / "lora", "--adapter", trained / "houlsby", "--base", base_folder]
    found = looked_at(*given, "--data", reviews, "--limit", 12, "--html", tmp_path / "two.html")
    assert [own["methods"] for own in found["adapters"]] == [["LoRA"], ["Houlsby adapter"]]
    losses = [own["scores"]["adapter"]["loss"] for own in found["adapters"]]
    assert found["comparison"]["score"]["difference"] == pytest.approx(losses[0] - losses[1])
    assert 0 <= found["comparison"]["agree"] <= 1
    assert "beside one another" in call("inspect", *given).stdout
    assert "named" in call("inspect", *given, "--adapter", trained / "prompt", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "no/such/folder/here"], "does not exist"),
        ([], "--adapter is missing"),
        (["--adapter", "{run}", "--data", "nothing.csv"], "nothing.csv"),
        (["--adapter", "{run}", "--limit", "0"], "limit"),
        (["--adapter", "{run}", "--html", "page.txt"], "no name of a page"),
        (["--adapter", "{run}", "--html", "no/such/folder/page.html"], "cannot be written"),
    ],
)
def test_wrong_use_is_one_line(arguments, said, trained, base_folder):
    given = [argument.format(run=trained / "lora") for argument in arguments]
    result = call("inspect", *given, "--base", base_folder, code=2)
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
