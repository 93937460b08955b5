"""What `inlay train` makes of labelled rows, served: labels as words are told apart, and a head that the base lacks is
named where its adapter does not load."""

from __future__ import annotations

import csv
import json
import shutil

import httpx
import pytest
from typer.testing import CliRunner

from inlay.cli.app import app
from serving import serving

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["a good film", "a bad film"]
RUNS = {
    "words": [], "verbalizer": ["--verbalizer", "1=positive,0=negative"], "head": ["--task", "classify"],
    "headonly": ["--task", "classify", "--method", "head"], "number": ["--task", "regress"],
}  # fmt: skip
HEADS = {"head": "classify", "headonly": "classify", "number": "regress"}


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def runs(base_folder, tmp_path_factory):
    """Each way to train on labels, as a run's folder."""
    folder = tmp_path_factory.mktemp("heads")
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = [(f"a {'good' if n % 2 else 'bad'} film {n}", n % 2) for n in range(20)]
        csv.writer(file).writerows([("text", "label"), *rows])
    for name, more in RUNS.items():
        given = ["--data", folder / "rows.csv", "--base", base_folder, "--dtype", "float32", "--steps", 2]
        command("train", *given, "--out", folder / "runs" / name, *more)
    foreign = folder / "runs" / "foreign"
    shutil.copytree(folder / "runs" / "head" / "adapter", foreign)
    (foreign / "inlay.json").unlink()
    return folder / "runs"


@pytest.fixture(scope="module")
def running(base_folder, runs):
    with serving(base_folder, runs) as made:
        yield made


def asked(running, name, path="classify", **body):
    return httpx.post(f"{running.url}/v1/{path}", json={"model": name, **body}, timeout=30)


@pytest.mark.parametrize("name", ["words", "verbalizer"])
def test_labels_that_are_words_have_the_probabilities_of_predict(running, runs, base_folder, tmp_path, name):
    found = asked(running, name, input=TEXTS)
    assert found.status_code == 200, found.text
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    given = ["--data", tmp_path / "new.csv", "--base", base_folder, "--dtype", "float32"]
    command("predict", "--adapter", runs / name, *given, "--out", tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for one, row in zip(found.json()["data"], said, strict=True):
        own = one["probabilities"]
        assert set(own) == {"0", "1"} and sum(own.values()) == pytest.approx(1)
        assert one["label"] == max(own, key=lambda label: own[label]) == row["prediction"]
        assert list(own.values()) == pytest.approx([row[f"probability of {label}"] for label in own], abs=1e-4)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_that_the_base_lacks_is_named(running, name):
    for _ in range(2):  # what did not load is refused by the same words again
        made = asked(running, name, input=TEXTS)
        said = made.json()["error"]["message"]
        assert made.status_code == 400
        assert f"'{name}' was trained to {HEADS[name]} with a head" in said
        assert "LlamaForCausalLM, has none. Ask it with `inlay predict`" in said
        assert ("words for its labels" in said) is (HEADS[name] == "classify")
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                       ("completions", {"prompt": "a"})):  # fmt: skip
        made = asked(running, name, path, **body)
        assert made.status_code == 400 and "writes no text" in made.json()["error"]["message"]
    known = {one["name"]: one for one in httpx.get(f"{running.url}/v1/adapters", timeout=30).json()["data"]}
    assert "has none" in known[name]["error"] and known[name]["loaded"] is False


def test_a_head_of_another_librarys_adapter_is_named_too(running):
    made = asked(running, "foreign", "completions", prompt="a", max_tokens=2)
    assert made.status_code >= 400 and "'foreign' was trained to classify with a head" in made.text
    loaded = httpx.post(
        f"{running.url}/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "foreign"}, timeout=30
    )
    assert loaded.status_code == 400 and "has none" in loaded.text
