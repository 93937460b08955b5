"""Clumsy hands: odd bases, odd rows, edited files, columns of other names, flags that say nothing."""

from __future__ import annotations

import csv
import json
import shutil
from typing import Any

import pytest
import transformers as tf

from test_first_hour import WORDS, answer, call, refused


@pytest.fixture(scope="module")
def plain(tokenizer):
    """The tokenizer without a chat template."""
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


@pytest.fixture(scope="module")
def bases(plain, tmp_path_factory):
    """Tiny bases: 64 learned positions, an encoder-decoder, and ones that write no text."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    ends: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": len(plain)}
    models = {
        "gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **ends)),
        "t5": tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ends)
        ),
        "bert": tf.BertModel(tf.BertConfig(vocab_size=len(plain), **sizes)),
        "masked": tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(plain), **sizes)),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        plain.save_pretrained(folder / name)
    return folder


def table(path, rows):
    with open(path, "w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    rows = [[f"a {'good' if n % 2 else 'bad'} film, number {n}", n % 2] for n in range(60)]
    return table(tmp_path_factory.mktemp("data") / "reviews.csv", [["text", "label"], *rows])


@pytest.fixture(scope="module")
def trained(base_folder, reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    given = ["--base", base_folder, "--data", reviews, "--out", out, *WORDS, "--steps", 4, "--dtype", "float32"]
    return out, answer("train", *given, "--heldout", "0.3")


@pytest.fixture
def edited(trained, tmp_path):
    """Copies the adapter with a file of it changed."""

    def change(file, **values):
        shutil.copytree(trained[0] / "adapter", tmp_path / "edited")
        path = tmp_path / "edited" / file
        told = json.loads(path.read_text())
        inner = values.pop("template", {})
        path.write_text(json.dumps({**told, **values, **({"template": told["template"] | inner} if inner else {})}))
        return tmp_path / "edited"

    return change


# ---- bases and rows


def test_long_held_out_rows_leave_positions_for_what_is_written(bases, tmp_path):
    rows = [["text", "label"], *[["word " * n, n % 2] for n in range(1, 90, 4)]]
    data = table(tmp_path / "long.csv", rows)
    for method in ("lora", "prompt"):
        given = ["--data", data, "--out", tmp_path / method, "--method", method, "--steps", 2, "--heldout", "0.4"]
        assert answer("train", "--base", bases / "gpt2", *given)["status"] == "done"
        story = json.loads((tmp_path / method / "run.json").read_text())
        assert len(story["samples"]) == 3 and not any("no samples" in line for line in story["notices"])


@pytest.mark.parametrize("base", ["gpt2", "t5"])
def test_rows_without_a_prompt_end_no_run(base, bases, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "" if n % 2 else f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    given = ["--base", bases / base, "--data", data, "--out", tmp_path / "run", "--steps", 2]
    result = answer("train", *given, "--heldout", "0.4")
    assert result["final_rows"] == 4 and result["heldout"]["loss"] > 0


def test_words_too_long_for_the_base_are_left_out_of_what_is_written(base_folder, reviews, tmp_path):
    words = ["--template", "{text}", "--verbalizer", "0=a,1=" + "good " * 200]
    given = ["--base", base_folder, "--data", reviews, "--out", tmp_path / "run", "--steps", 1, "--heldout", "0.2"]
    assert answer("train", *given, *words)["rows"]["dropped: answer too long"] == 24


def test_what_cannot_write_or_read_is_refused(bases, reviews, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo")
    for given in (["eval"], ["train", "--out", tmp_path / "run", "--heldout", 0]):
        assert "rows of text have no prompt" in refused(*given, "--base", bases / "t5", "--data", text)
        for base in ("bert", "masked"):
            assert "does not write text" in refused(*given, "--base", bases / base, "--data", reviews, *WORDS)
    assert not (tmp_path / "run").exists()


def test_final_rows_score_the_same_in_eval(trained, base_folder, reviews, tmp_path):
    out, result = trained
    lines = [json.loads(line)["where"].rpartition(" ")[2] for line in (out / "final.jsonl").read_text().splitlines()]
    with open(reviews, newline="", encoding="utf8") as file:
        every = list(csv.reader(file))
    data = table(tmp_path / "final.csv", [every[0], *[every[int(n) - 1] for n in lines]])
    again = answer("eval", "--base", base_folder, "--data", data, "--adapter", out)
    assert again["rows"] == result["final_rows"] == len(lines)
    assert again["base"] == pytest.approx(result["heldout_base"], abs=1e-6)
    assert again["adapters"][str(out)] == pytest.approx(result["heldout"], abs=1e-6)


# ---- columns of other names


def test_columns_of_other_names_keep_the_adapters_template(trained, base_folder, reviews, tmp_path):
    out, _ = trained
    with open(reviews, newline="", encoding="utf8") as file:
        rows = list(csv.reader(file))[1:]
    other = table(tmp_path / "other.csv", [["my {text}", "stars"], *rows])
    bare = table(tmp_path / "bare.csv", [["body"], *[row[:1] for row in rows]])
    given = ["--base", base_folder, "--adapter", out, "--data"]
    known = answer("eval", *given, reviews)
    named = answer("eval", *given, other, "--columns", "text=my {text},label=stars")
    assert named == known
    said = [answer("predict", *given, data, *more)["predictions"] for data, more in (
        (reviews, []), (bare, ["--columns", "text=body"]), (bare, ["--template", WORDS[1].replace("text", "body")]),
    )]  # fmt: skip
    shares = [[row["probability"] for row in one] for one in said]
    assert shares[0] == shares[1] == shares[2]
    assert "--columns text=NAME." in refused("predict", *given, bare, code=1)
    assert "--columns text=NAME,label=NAME." in refused("eval", *given, bare, code=1)
    worded = answer("eval", *given, reviews, "--verbalizer", "0=negative,1=positive")
    assert worded == known


def test_going_on_from_an_adapter_keeps_its_template(trained, base_folder, reviews, tmp_path):
    out, _ = trained
    with open(reviews, newline="", encoding="utf8") as file:
        other = table(tmp_path / "other.csv", [["body", "stars"], *list(csv.reader(file))[1:]])
    run = ["--base", base_folder, "--from", out, "--data", other, "--columns", "text=body,label=stars"]
    answer("train", *run, "--out", tmp_path / "run", "--steps", 1, "--heldout", 0)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["template"]
    assert told["prompt"] == "Review: {body}\nSentiment:" and told["answer"] == "stars"
    assert told["verbalizer"] == {"0": ["negative"], "1": ["positive"]}


def test_a_row_that_is_refused_does_not_stop_predict(trained, base_folder, tmp_path):
    out, _ = trained
    data = tmp_path / "odd.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in ("a good film", 5, ["a"], "", "a bad film")))
    said = answer("predict", "--base", base_folder, "--adapter", out, "--data", data)["predictions"]
    assert [bool(row["prediction"]) for row in said] == [True, False, False, False, True]
    assert "holds a number" in said[1]["problem"] and "holds a list" in said[2]["problem"]


def test_a_prediction_that_fails_at_once_leaves_no_file(trained, base_folder, reviews, tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise MemoryError

    monkeypatch.setattr("inlay.evaluation.predict.score", broken)
    given = ["--base", base_folder, "--adapter", trained[0], "--data", reviews, "--out", tmp_path / "said.csv"]
    assert "out of memory" in refused("predict", *given, code=1)
    assert not list(tmp_path.iterdir())


# ---- values that say nothing or too much


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", ""], "--lr is empty"),
        (["--template", ""], "--template is empty"),
        (["--heldout", ""], "--heldout is empty"),
        (["--set", ""], "--set is empty"),
        (["--steps", "99999999999"], "from 1 to 2,147,483,647"),
        (["--max-length", "1"], "a whole number of 2 or more"),
        (["--epochs", "1e7"], "to 1,000,000"),
        (["--verbalizer", "0=a,1=a"], "'a' stands for '0' and for '1'"),
        (["--verbalizer", "0=bad|awful,1=good|bad"], "'bad' stands for '0' and for '1'"),
        (["--verbalizer", "{"], "it is no mapping"),
        (["--data", "-", "--heldout", "-"], "both standard input"),
        (["--max-grad-norm", "1"], "No such option: --max-grad-norm"),
        (["more"], "inlay train -h lists"),
        (["--set", "targets=[]"], "targets are an empty list"),
        (["--set", "rank_pattern={nope: 4}"], "rank_pattern names 'nope'"),
        (["--verbalizer", "{0: bad, 0.0: worse, 1: good}"], "it is no mapping"),
    ],
)
def test_flags_that_cannot_be_meant(arguments, said, base_folder, reviews, tmp_path):
    data = [] if "--data" in arguments else ["--data", reviews]
    words = [] if set(arguments) & {"--verbalizer", "--template"} else WORDS
    line = refused("train", "--base", base_folder, *data, "--out", tmp_path / "run", *words, *arguments)
    assert said in line.replace("root train", "inlay train")
    assert not (tmp_path / "run").exists()


def test_what_a_config_says_twice_is_refused(base_folder, reviews, tmp_path):
    config = tmp_path / "run.yaml"
    given = ["--base", base_folder, "--data", reviews, "--out", tmp_path / "run", "--config", config]
    for text in ("lr: 1e-4\nlr: 1e-3", "verbalizer: {0: bad, 0.0: worse, 1: good}"):
        config.write_text(f"{text}\n")
        assert "a key is there twice" in refused("train", *given)
    config.write_text("verbalizer: {'1': good, 1.0: better, 0: bad}\n")
    assert "the label '1' is named twice" in refused("train", *given)


def test_resume_says_what_it_lacks(tmp_path):
    assert "Give --out" in refused("train", "--resume")
    assert refused("trian").startswith("error: No such command 'trian'. Did you mean 'train'? ")


def test_the_home_folder_is_known_in_files_too(base_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(reviews, tmp_path / "mine.csv")
    config = tmp_path / "run.yaml"
    config.write_text("data: ~/mine.csv\nout: ~/runs/a\nheldout: ~/mine.csv\nsteps: 1\n")
    answer("train", "--config", "~/run.yaml", "--base", base_folder, *WORDS)
    given = ["--base", base_folder, "--adapter", "~/runs/a", "--data", "~/mine.csv", "--limit", 3]
    answer("predict", *given, "--out", "~/said.csv")
    assert (tmp_path / "said.csv").exists() and (tmp_path / "runs" / "a" / "run.json").exists()


def test_commands_to_type_next_can_be_typed(base_folder, reviews, tmp_path):
    out = tmp_path / "my 'first' run"
    given = ["--base", base_folder, "--data", reviews, "--out", out, *WORDS, "--steps", 1, "--heldout", 0]
    import shlex

    said = call("train", *given).stdout.splitlines()
    line = next(line for line in said if "inlay predict" in line)
    assert shlex.split(line)[shlex.split(line).index("--adapter") + 1] == str(out)
    assert any(line.startswith("done after 1 step, ") and line.endswith("parameters trained") for line in said)


def test_words_that_no_terminal_takes_are_escaped(trained, base_folder, tmp_path):
    line = refused("eval", "--base", base_folder, "--data", tmp_path / "no\x1b[31mfile.csv")
    assert "\x1b" not in line and r"no\x1b[31mfile.csv" in line
    data = tmp_path / "odd.jsonl"
    data.write_text(json.dumps({"text": "a good film", "id": "\ud800"}))
    given = ["predict", "--base", base_folder, "--adapter", trained[0], "--data", data]
    assert answer(*given)["predictions"][0]["id"] == "\ud800"
    assert json.loads(call(*given).stdout)["id"] == "\ud800"


def test_a_table_names_adapters_shortly(trained, edited, base_folder, reviews):
    both = ["--adapter", trained[0], "--adapter", trained[0] / "adapter"]
    table = call("eval", "--base", base_folder, "--data", reviews, *both, env={"COLUMNS": "200"}).stdout
    assert f"{trained[0]} " in table and f"{trained[0] / 'adapter'} " in table
    one = call("eval", "--base", base_folder, "--data", reviews, *both[:2], "--adapter", edited("inlay.json")).stdout
    assert " run " in one and " edited " in one and str(trained[0]) not in one


# ---- files that somebody edited


@pytest.mark.parametrize(
    "values", [{"config": None}, {"config": "x"}, {"data": []}, {"total_steps": "x"}, {"status": 5}, {"result": 1}]
)
def test_a_story_of_another_shape_is_refused(values, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert "is not what a run writes" in refused("train", "--resume", "--out", tmp_path / "run", "--steps", 9, code=1)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("adapter_config.json", {"use_rslora": "x"}, "LoRA's use_rslora is 'x'"),
        ("adapter_config.json", {"lora_dropout": "x"}, "LoRA's dropout is 'x'"),
        ("inlay.json", {"max_length": 1}, "max_length is 1"),
        ("inlay.json", {"template": {"verbalizer": {}}}, "names no labels"),
        ("inlay.json", {"template": {"kind": "x"}}, "Save the adapter again"),
    ],
)
def test_an_edited_adapter_is_refused(file, values, said, edited, base_folder, reviews):
    given = ["--base", base_folder, "--data", reviews, "--adapter", edited(file, **values)]
    line = refused("eval", *given, code=1)
    assert said in line and file in line


def test_adapters_of_other_lengths_are_scored_together(trained, edited, base_folder, reviews):
    shorter = edited("inlay.json", max_length=40)
    both = ["--base", base_folder, "--data", reviews, "--adapter", trained[0], "--adapter", shorter]
    assert len(answer("eval", *both)["adapters"]) == 2
    path = shorter / "inlay.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "virtual_tokens_at": "after-system"}))
    assert "virtual tokens at different places" in refused("eval", *both)


def test_what_a_folder_cannot_take_is_not_always_space(trained, base_folder, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter").write_text("mine")
    line = refused("train", "--resume", "--out", tmp_path / "run", "--steps", 5, code=1)
    assert "Mend that, then go on" in line


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "schedule-free"])
def test_optimizers_that_keep_their_rate_otherwise_run_and_go_on(optimizer, base_folder, reviews, tmp_path):
    given = ["--base", base_folder, "--data", reviews, *WORDS, "--heldout", 0, "--optimizer", optimizer]
    run = ["--out", tmp_path / "run"]
    answer("train", *given, *run, "--steps", 3)
    assert answer("train", "--resume", *run, "--steps", 5)["steps"] == 5
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 5 and all(isinstance(rate, float) and rate > 0 for rate in rates)


# ---- chat


def test_chat_says_what_it_does_not_do(bases, base_folder):
    talk = ["--max-new-tokens", 3]
    assert "no JSON" in refused("chat", "--base", base_folder, *talk, "--json")
    assert "no chat template" in refused("chat", "--base", bases / "gpt2", *talk, "--system", "be brief")
    assert "Leave --chat and --system out" in refused("generate", "--base", bases / "gpt2", "--prompt", "a", "--chat")
    said = call("chat", "--base", base_folder, *talk, input="/help\n/adapter\n/exit\nnever\n")
    assert "/help is none of /base" in said.stderr and "there is no adapter" in said.stderr and not said.stdout
    assert "not UTF-8" in call("chat", "--base", base_folder, *talk, input=b"\xff\xfe\n", code=1).stderr


def test_chat_writes_as_much_as_there_are_positions_for(bases):
    said = call("chat", "--base", bases / "gpt2", "--temperature", 0, input="a good film\n")
    assert "each line stands alone" in said.stderr and "positions" not in said.stderr and said.stdout.strip()
