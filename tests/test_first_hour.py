"""What a newcomer types, rightly and clumsily, and what comes of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from inlay.cli.app import app

WORDS = ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive"]


def call(*arguments, code=0, **more):
    result = CliRunner().invoke(app, [str(a) for a in arguments], **more)
    if code == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def answer(*arguments):
    lines = call(*arguments, "--json").stdout.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def refused(*arguments, code=2):
    """The one line that says what is wrong."""
    lines = call(*arguments, code=code).stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "More is in" not in lines[-1], lines
    return lines[-1]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"a {'good' if n % 2 else 'bad'} film, number {n}", n % 2] for n in range(60))
    return path


@pytest.fixture(scope="module")
def trained(base_folder, reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    given = ["--base", base_folder, "--data", reviews, "--out", out, *WORDS, "--steps", 20, "--lr", 1e-2]
    return out, answer("train", *given, "--heldout", "0.2", "--batch-size", 8)


# ---- values


def test_a_config_file_is_read_as_it_looks(base_folder, reviews, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"base: {base_folder}\ndata: {reviews}\nlr: 1e-4\nsteps: 1\nheldout: 0\nset: r=2\nlimit: 20\n"
        "columns: {text: text, label: label}\nverbalizer: {0: bad, 1: [good, great]}\nmax-length: 40\n"
    )
    answer("train", "--config", config, "--out", tmp_path / "run", "--set", "alpha=3")
    told = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (told["lr"], told["set"], told["max_length"]) == (1e-4, {"r": 2, "alpha": 3}, 40)
    assert told["verbalizer"] == {"0": ["bad"], "1": ["good", "great"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"batch_size: null", "batch_size is None"),
        (b"steps: lots", "steps is 'lots'"),
        (b"seed: abc", "seed is 'abc'"),
        (b"data: 5", "data is 5"),
        (b"verbalizer: {0: 5}", "verbalizer"),
        (b"memory_limit: 4", "Write 4GB"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- a", "holds no settings"),
        (b"stepz: 3", "stepz"),
        (b"{" * 5000, "is not YAML"),
        (b"", "holds no settings"),
        (b"set: 5", "set is 5"),
        (b"lr: .inf", "lr is "),
        (b"out: [a]", "out is"),
    ],
)
def test_a_config_file_that_cannot_be(content, said, base_folder, reviews, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_bytes(content)
    given = [] if b"data" in content else ["--data", reviews]
    given += [] if b"out" in content else ["--out", tmp_path / "run"]
    assert said in refused("train", "--config", config, "--base", base_folder, *given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--set", "layers=9", "layer 9 does not exist"),
        ("--set", "targets=5", "targets is 5"),
        ("--set", "alpha=x", "alpha"),
        ("--set", "r=", "'r=' cannot be read"),
        ("--set", "r=8.5", "r is 8.5"),
        ("--set", "r=true", "r is True"),
        ("--set", "r=999", "r is 999, more than"),
        ("--lr", "inf", "lr is "),
        ("--lr", "abc", "lr is 'abc'"),
        ("--weight-decay", "inf", "weight_decay is "),
        ("--epochs", "1e300", "epochs is"),
        ("--epochs", "inf", "epochs is "),
        ("--seed", "9223372036854775808", "seed is"),
        ("--max-length", "0", "max_length is 0"),
        ("--memory-limit", "4", "Write 4GB"),
        ("--limit", "-3", "limit is -3"),
        ("--batch-size", "2.5", "batch_size is 2.5"),
        ("--heldout", "1.5", "heldout is"),
        ("--track", "paper", "paper"),
        ("--optimizer", "adam", "Did you mean 'adamw'"),
        ("--group", "nobody", "nobody"),
    ],
)
def test_a_flag_that_cannot_be_is_named(flag, value, said, base_folder, reviews, tmp_path):
    given = {"--base": base_folder, "--data": reviews, "--out": tmp_path / "run", "--steps": 1, flag: value}
    assert said in refused("train", *WORDS, *[x for pair in given.items() for x in pair])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--limit", "-3"], "limit is -3"),
        (["eval", "--max-length", "0"], "max_length is 0"),
        (["eval", "--tokens-at-once", "0"], "tokens_at_once is 0"),
        (["preview", "--rows", "0"], "rows is 0"),
        (["preview", "--row", "-1"], "row is -1"),
        (["preview", "--row", "999"], "--row 999 is not there"),
        (["preview", "--set", "r=x"], "r is 'x'"),
        (["generate", "--temperature", "nan", "--prompt", "a"], "temperature is "),
        (["generate", "--temperature", "inf", "--prompt", "a"], "temperature is "),
        (["generate", "--top-p", "0"], "top_p is 0"),
        (["generate", "--prompt", ""], "prompt"),
        (["generate", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "--beams", "0"], "beams is 0"),
        (["chat", "--top-p", "2"], "top_p is 2"),
        (["chat", "--seed", "x"], "seed is 'x'"),
        (["predict", "--batch", "0", "--adapter", "x"], "batch is 0"),
        (["merge", "--dtype", "int3"], "dtype 'int3'"),
        (["generate", "--prompt", "a", "--max-new-tokens", "1000"], "128 positions"),
        (["methods", "lora2"], "Methods: lora"),
    ],
)
def test_every_command_checks_like_train(arguments, said, base_folder, reviews):
    more = [] if arguments[0] == "methods" else ["--base", base_folder]
    more += ["--data", reviews] if arguments[0] in ("eval", "preview", "predict") else []
    more += ["--prompt", "a"] if arguments[0] == "generate" and "--prompt" not in arguments else []
    more += ["--adapter", "a", "--out", "b"] if arguments[0] == "merge" else []
    assert said in refused(*arguments, *more)


# ---- the last net


def test_what_nobody_foresaw_is_one_line_and_a_log(base_folder, reviews, monkeypatch, tmp_path):
    monkeypatch.setenv("INLAY_HOME", str(tmp_path))

    def broken(*arguments, **more):
        raise ZeroDivisionError("nobody\nforesaw this")

    monkeypatch.setattr("inlay.data.table.read_table", broken)
    said = call("eval", "--base", base_folder, "--data", reviews, code=1).stderr
    assert said.startswith("error: scoring failed (ZeroDivisionError: nobody)") and said.count("\n") == 1
    log = said.split("is in ")[1].strip()
    with open(log, encoding="utf8") as file:
        text = file.read()
    assert "Traceback" in text and "foresaw this" in text and log.startswith(str(tmp_path))


# ---- using the result


def test_predict_gives_every_row_a_label_and_probabilities(trained, base_folder, tmp_path):
    out, _ = trained
    data = tmp_path / "new.jsonl"
    rows = [
        {"id": 7, "text": "a good film, number 3"},
        {"id": 8, "text": None},
        {"id": 9, "text": "a bad film, number 4"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name in ("said.csv", "said.jsonl"):
        result = answer("predict", "--base", base_folder, "--adapter", out, "--data", data, "--out", tmp_path / name)
        assert result["rows"] == 3
    with open(tmp_path / "said.csv", newline="", encoding="utf8") as file:
        said = list(csv.DictReader(file))
    assert [row["id"] for row in said] == ["7", "8", "9"] and [row["prediction"] for row in said] == ["1", "", "0"]
    assert said[1]["problem"] == "no text" and float(said[0]["probability"]) > 0.5
    shares = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert abs(shares[0]["probability of 0"] + shares[0]["probability of 1"] - 1) < 1e-6
    printed = call("predict", "--base", base_folder, "--adapter", out / "adapter", "--data", data).stdout
    assert [json.loads(line)["prediction"] for line in printed.splitlines()] == ["1", "", "0"]
    assert len(answer("predict", "--base", base_folder, "--adapter", out, "--data", data)["predictions"]) == 3


def test_predict_goes_on_where_it_was_broken_off(trained, base_folder, tmp_path, monkeypatch):
    out, _ = trained
    data = tmp_path / "new.csv"
    with open(data, "w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([["text"], *[[f"a good film,\nnumber {n}"] for n in range(40)]])
    given = ["predict", "--base", base_folder, "--adapter", out, "--data", data]
    call(*given, "--out", tmp_path / "whole.csv")
    monkeypatch.setattr("inlay.cli.predict.CHUNK", 8)
    import inlay.evaluation.predict as predict

    scored, done = predict.score, []

    def breaks(*arguments, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return scored(*arguments, **more)

    monkeypatch.setattr(predict, "score", breaks)
    call(*given, "--out", tmp_path / "said.csv", code=130)
    monkeypatch.setattr(predict, "score", scored)
    with open(tmp_path / "said.csv", "ab") as file:
        file.write(b'"half a ro')
    assert "Add --resume" in refused(*given, "--out", tmp_path / "said.csv")
    said = call(*given, "--out", tmp_path / "said.csv", "--resume").stderr
    assert "going on after row 16" in said
    numbers = [list(csv.reader(open(tmp_path / name, newline=""))) for name in ("said.csv", "whole.csv")]  # noqa: SIM115
    assert [row[:2] for row in numbers[0]] == [row[:2] for row in numbers[1]] and len(numbers[0]) == 41
    assert not list(tmp_path.glob(".*progress*"))
    assert "exists" in refused(*given, "--out", tmp_path / "said.csv")


def test_predict_writes_text_for_the_rest(base_folder, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([json.dumps({"prompt": "question", "completion": " answer"})] * 12))
    run = [
        "--base",
        base_folder,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--steps",
        30,
        "--lr",
        1e-2,
        "--heldout",
        0,
    ]
    answer("train", *run)
    data.write_text("\n".join(json.dumps({"prompt": "question" * n}) for n in (1, 2, 1)))
    result = answer(
        "predict", "--base", base_folder, "--adapter", tmp_path / "run", "--data", data, "--max-new-tokens", 5
    )
    said = [one["prediction"] for one in result["predictions"]]
    assert said[0] == said[2] and said[0].startswith("answer") and not said[1].startswith("question")
    alone = answer(
        "generate", "--base", base_folder, "--adapter", tmp_path / "run", "--prompt", "question", "--max-new-tokens", 5
    )
    assert alone["text"].strip() == said[0]
    assert "--system has no place" in refused(
        "generate", "--base", base_folder, "--adapter", tmp_path / "run", "--prompt", "a", "--system", "b"
    )


def test_generate_takes_a_system_message(base_folder):
    given = ["generate", "--base", base_folder, "--prompt", "question", "--max-new-tokens", 3]
    assert answer(*given, "--system", "answer")["new_tokens"] <= 3
    from inlay.cli.generate import Generate
    from inlay.cli.writing import open_writer

    asked = Generate(prompt="question", base=str(base_folder), system="be brief")
    writer = open_writer(asked, None, system=asked.system)
    ids, _ = writer.prompt(asked.prompt)
    said = writer.encoder.tokenizer.decode(ids)
    turns = ["system\nbe brief<|im_end|>\n", "user\nquestion<|im_end|>\n", "assistant\n"]
    assert said == "".join("<|im_start|>" + turn for turn in turns)
    assert "--raw takes the prompt as it is" in refused(*given, "--raw", "--chat")


def test_train_goes_on_from_an_adapter_and_beyond_its_end(trained, base_folder, reviews, tmp_path):
    out, result = trained
    given = ["--base", base_folder, "--data", reviews, *WORDS, "--heldout", "0.2", "--batch-size", 8]
    further = answer("train", *given, "--out", tmp_path / "further", "--from", out, "--steps", 2, "--lr", 1e-4)
    assert further["train_loss"] < 1.5 * result["train_loss"] and further["steps"] == 2
    assert "takes method and settings from the adapter" in refused(
        "train", *given, "--out", tmp_path / "b", "--from", out, "--set", "r=2"
    )
    run = ["--out", tmp_path / "run", "--lr", 1e-2]
    answer("train", *given, *run, "--steps", 4)
    longer = answer("train", "--resume", *run[:2], "--steps", 9)
    assert longer["steps"] == 9 and longer["status"] == "done"
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 10))
    again = call("train", "--resume", *run[:2])
    assert "nothing to go on with" in again.stderr


def test_the_end_of_a_run_is_a_table_and_the_next_commands(trained, base_folder, reviews, tmp_path):
    given = ["--base", base_folder, "--data", reviews, *WORDS, "--steps", 2, "--heldout", "0.2"]
    said = call("train", *given, "--out", tmp_path / "run").stdout
    for part in ("base", "adapter", "accuracy", " – ", "tokens/s", "report.html", "inlay predict", "inlay merge"):
        assert part in said, part
    table = call("eval", "--base", base_folder, "--data", reviews, "--adapter", tmp_path / "run").stdout
    assert "accuracy" in table and "60 rows" in table


# ---- messages


def test_folders_and_files_that_are_taken_for_adapters(trained, base_folder, reviews, tmp_path):
    out, _ = trained
    given = ["eval", "--base", base_folder, "--data", reviews, "--adapter"]
    assert str(out / "adapter") in refused(*given, out / "adapter" / "adapter_model.safetensors")
    assert "Give it as --base" in refused(*given, base_folder)
    assert "does not exist" in refused(*given, tmp_path / "nothing")
    assert "adapter_config.json" in refused(*given, tmp_path)
    assert set(answer(*given, out)["adapters"]) == {str(out)}
    (tmp_path / "unread").mkdir()
    for file in (out / "adapter").iterdir():
        (tmp_path / "unread" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "unread" / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert "adapter_model.safetensors is not a whole safetensors file" in refused(*given, tmp_path / "unread", code=1)


def test_places_that_nothing_can_be_written_to(trained, base_folder, reviews, tmp_path):
    out, _ = trained
    file = tmp_path / "file"
    file.write_text("mine")
    train = ["train", "--base", base_folder, "--data", reviews, *WORDS, "--steps", 1, "--out"]
    assert str(file) in refused(*train, file) and str(file) in refused(*train, file / "below")
    merge = ["merge", "--base", base_folder, "--adapter", out, "--out"]
    assert str(file) in refused(*merge, file) and str(file) in refused(*merge, file / "below")
    predict = ["predict", "--base", base_folder, "--adapter", out, "--data", reviews, "--out"]
    assert "unknown kind" in refused(*predict, tmp_path / "said.xlsx")
    assert "a folder that is there" in refused(*predict, tmp_path / "no" / "said.csv")
    assert file.read_text() == "mine"
    assert "holds no run to go on with" in refused("train", "--resume", "--out", tmp_path / "nothing")


def test_the_command_is_there_in_every_way(base_folder):
    ran = [
        subprocess.run(
            [sys.executable, "-m", "inlay", flag], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        for flag in ("--version", "-h", "--show-completion")
    ]
    assert ran[0].stdout.startswith("inlay 0.") and "predict" in ran[1].stdout and not ran[1].stderr
    assert all("Traceback" not in done.stderr for done in ran)
    help_ = subprocess.run(
        [sys.executable, "-m", "inlay", "train", "-h"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    for choice in ("linear|cosine|constant", "lora|dora", "schedule-free", "auto|float32", "[default: (16)]"):
        assert choice in help_.stdout, choice
    explained = answer("methods", "lora")["methods"]["lora"]
    assert explained["lr"] > 0 and all(one["help"] for one in explained["settings"].values())
    shown = call("methods", "prefix").stdout
    assert "num_virtual_tokens" in shown and "20 tokens of every row" in " ".join(shown.split())
