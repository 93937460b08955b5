"""The commands from end to end on a tiny base, and what clumsy hands get to read."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from inlay.cli.app import app
from inlay.methods.table import METHODS
from zoo import ALONE, FITTING

WORDS = ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for n in range(60):
            writer.writerow([f"a {'good' if n % 2 else 'bad'} film, number {n}", n % 2])
    return path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if code == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def answer(*arguments):
    """The one JSON object on stdout."""
    lines = call(*arguments, "--json").stdout.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def trained(base_folder, reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    result = answer(
        "train", "--base", base_folder, "--data", reviews, "--out", out, *WORDS, "--epochs", 6, "--lr", 5e-3,
        "--heldout", "0.2", "--dtype", "float32", "--batch-size", 8,
    )  # fmt: skip
    return out, result


def test_train_reports_what_it_did(trained):
    out, result = trained
    for name in ("tokens", "seconds", "tokens_per_second", "peak_memory_mb", "train_loss", "trainable_parameters"):
        assert result[name] > 0, name
    assert result["heldout"]["accuracy"] > result["heldout_base"]["accuracy"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["tokens"] == result["tokens"]
    story = json.loads((out / "run.json").read_text())
    assert story["config"]["seed"] == 0 and story["base_fingerprint"] and story["versions"]["torch"]
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_the_same_run_again_gives_the_same_adapter(trained, base_folder, reviews, tmp_path):
    again = tmp_path / "again"
    answer(
        "train", "--base", base_folder, "--data", reviews, "--out", again, *WORDS, "--epochs", 6, "--lr", 5e-3,
        "--heldout", "0.2", "--dtype", "float32", "--batch-size", 8,
    )  # fmt: skip
    file = "adapter/adapter_model.safetensors"
    assert (trained[0] / file).read_bytes() == (again / file).read_bytes()


def test_eval_uses_the_template_that_travels(trained, base_folder, reviews):
    adapter = trained[0] / "adapter"
    result = answer("eval", "--base", base_folder, "--data", reviews, "--adapter", adapter, "--dtype", "float32")
    assert result["rows"] == 60
    assert result["adapters"][str(adapter)]["accuracy"] > result["base"]["accuracy"]


def test_generate_and_merge(trained, base_folder, tmp_path):
    adapter = trained[0] / "adapter"
    asked = ["--prompt", "a good film, number 3", "--max-new-tokens", 4, "--dtype", "float32"]
    said = answer("generate", "--base", base_folder, "--adapter", adapter, *asked)["text"]
    assert said.strip().startswith("positive")
    merged = answer("merge", "--base", base_folder, "--adapter", adapter, "--out", tmp_path / "merged")
    assert merged["max_difference"] < 1e-4
    prompt = "Review: a good film, number 3\nSentiment:"
    raw = ["--raw", "--prompt", prompt, "--max-new-tokens", 4, "--dtype", "float32"]
    assert answer("generate", "--base", tmp_path / "merged", *raw)["text"] == said
    assert call("generate", "--base", tmp_path / "merged", *raw).stdout.strip() == said.strip()


@pytest.mark.parametrize("method", ALONE)
def test_every_method_trains_from_the_command(method, base_folder, reviews, tmp_path):
    more = [word for key, value in FITTING.get(method, {}).items() for word in ("--set", f"{key}={value}".lower())]
    result = answer(
        "train", "--base", base_folder, "--data", reviews, "--out", tmp_path / "run", *WORDS, "--method", method,
        "--steps", 2, "--heldout", "0", *more,
    )  # fmt: skip
    assert result["steps"] == 2 and result["heldout"] == {}
    answer("eval", "--base", base_folder, "--data", reviews, "--adapter", tmp_path / "run" / "adapter", "--limit", 5)


def test_settings_come_from_a_file_and_flags_win(base_folder, reviews, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {base_folder}\nsteps: 3\nset: {{r: 2}}\nheldout: '0'\n")
    given = ["--config", config, "--data", reviews, *WORDS]
    assert answer("train", *given, "--out", tmp_path / "a")["steps"] == 3
    wide = answer("train", *given, "--out", tmp_path / "b", "--steps", 1, "--set", "r=4")
    assert wide["steps"] == 1
    config.write_text("stepz: 3\n")
    assert "stepz" in call("train", "--config", config, "--data", reviews, "--out", tmp_path / "c", code=2).stderr


def test_other_kinds_of_rows(base_folder, tmp_path):
    kinds = {
        "completion": [{"prompt": "question", "completion": " answer"}] * 4,
        "messages": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4,
        "text": [{"text": "a good film"}] * 4,
    }
    for kind, rows in kinds.items():
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        out = tmp_path / kind
        run = ["--base", base_folder, "--data", data, "--out", out, "--steps", 2, "--heldout", data]
        assert answer("train", *run)["heldout"]["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "nothing"], "no base is called 'nothing'"),
        (["--data", "no.csv"], "no.csv does not exist"),
        (["--method", "lora2"], "Did you mean 'lora'"),
        (["--set", "rank=3"], "no setting 'rank'"),
        (["--set", "r"], "Write --set key=value"),
        (["--set", "targets=zzz"], "Candidates: "),
        (["--verbalizer", "0=negative"], "has the label '1'"),
        (["--dtype", "int3"], "Choose one of auto"),
        (["--columns", "text=body"], "no column 'body'"),
        (["--lr", "-1"], "lr is -1"),
        (["--schedule", "up"], "schedule 'up'"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(arguments, said, base_folder, reviews, tmp_path):
    given = {"--base": base_folder, "--data": reviews, "--out": tmp_path / "run", "--steps": 1}
    given |= dict(zip(WORDS[::2], WORDS[1::2], strict=True)) | {arguments[0]: arguments[1]}
    code = 1 if "label" in said else 2
    result = call("train", *[x for pair in given.items() for x in pair], code=code)
    assert said in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused(trained, tokenizer, reviews, tmp_path):
    import transformers as tf

    other = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        )
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    adapter = trained[0] / "adapter"
    said = call("eval", "--base", tmp_path / "other", "--data", reviews, "--adapter", adapter, code=1).stderr
    assert "another base" in said


def test_a_finished_run_is_not_overwritten(trained, base_folder, reviews):
    said = call("train", "--base", base_folder, "--data", reviews, "--out", trained[0], code=2).stderr
    assert "finished run" in said


def test_help_is_quick_and_methods_are_listed():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from inlay.cli.app import app; sys.argv = ['inlay', '--help']; app()"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "train" in done.stdout and time.perf_counter() - start < 20
    loaded = subprocess.run(
        [sys.executable, "-c", "import inlay.cli.app, sys; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "False"
    assert set(answer("methods")["methods"]) == set(METHODS)


def test_chat_keeps_the_conversation_and_switches(base_folder, monkeypatch, trained):
    typed = "question\n/base\nquestion\n/adapter\n/reset\n\nquestion\n/quit\nnever\n"
    given = ["--base", base_folder, "--max-new-tokens", 3, "--temperature", 0, "--dtype", "float32"]
    plain = CliRunner().invoke(app, [str(a) for a in ["chat", *given]], input=typed)
    assert plain.exit_code == 0 and plain.stderr.count("plain base answers") == 2
    said = CliRunner().invoke(app, [str(a) for a in ["chat", *given, "--adapter", trained[0] / "adapter"]], input=typed)
    assert said.exit_code == 0 and "stands alone" in said.stderr and "the adapter answers" in said.stderr
    assert call("chat", "--base", base_folder, "--top-p", 0, code=2).stderr.count("\n") == 1


def test_doctor_looks_at_the_machine():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert told["gflops"] > 0 and told["dtype"] in ("float32", "bfloat16") and told["versions"]["torch"]
    assert result.exit_code == bool(told["troubles"])


def test_trackers_get_the_numbers(base_folder, reviews, tmp_path):
    out = tmp_path / "run"
    given = ["--base", base_folder, "--data", reviews, *WORDS, "--steps", 4, "--eval-every", 2, "--heldout", "0.2"]
    answer("train", *given, "--out", out, "--track", "tensorboard")
    events = list((out / "track").rglob("events.*"))
    assert events and any(b"heldout/loss" in file.read_bytes() for file in events)
    assert "Trackers: " in call("train", *given, "--out", tmp_path / "b", "--track", "paper", code=2).stderr


def test_a_run_has_a_report_a_card_and_a_plan_of_memory(trained):
    out, result = trained
    assert "<svg" in (out / "report.html").read_text() and "held-out" in (out / "adapter" / "README.md").read_text()
    story = json.loads((out / "run.json").read_text())
    assert story["memory"]["estimate_mb"] > story["memory"]["least_mb"] > 0
    assert story["samples"] and sum(map(sum, story["confusion"]["adapter"])) == story["final_rows"]
    assert result["duplicates"] == 0 and (out / "last" / "adapter_model.safetensors").exists()


def test_a_limit_below_the_base_is_refused_before_training(base_folder, reviews, tmp_path):
    said = call(
        "train", "--base", base_folder, "--data", reviews, *WORDS, "--out", tmp_path / "run", "--memory-limit", "10MB",
        code=1,
    ).stderr  # fmt: skip
    assert "the limit is 10 MB" in said and not (tmp_path / "run" / "metrics.jsonl").exists()
