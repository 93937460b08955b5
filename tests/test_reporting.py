"""The card and the command hold what the run was, whatever odd words it had, and both can be run as they stand."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from inlay.data.yaml import read_yaml
from inlay.reporting.card import model_card, write_card
from inlay.reporting.markdown import code, fenced, plain
from inlay.reporting.naming import named
from inlay.reporting.words import breakable, cut_front, interval_text, label_text, score_text
from inlay.runs.command import command_of
from inlay.runs.settings import Settings
from inlay.values import fields_of

WORDS = {"0": ["bad"], "1": ["good", "great"]}
STORY = {
    "status": "done", "method": "LoRA", "steps": 40, "metric": "loss", "best_step": 30, "dtype": "float32",
    "heldout": {"loss": 0.3, "accuracy": 0.857}, "heldout_base": {"loss": 0.6, "accuracy": 0.7},
    "heldout_intervals": {"loss": [0.28, 0.33], "accuracy": [0.831, 0.882]},
    "heldout_base_intervals": {"accuracy": [0.66, 0.74]}, "final_rows": 500, "choosing_rows": 200,
    "comparison": {"metric": "accuracy", "difference": 0.157, "interval": [0.11, 0.2], "rows": 500, "better": True},
    "rows": {"rows": 100, "cut": 3, "dropped: nothing to learn": 2},
    "config": {"base": "smollm2", "data": ["/home/me/a.csv"], "out": "/home/me/run", "method": "lora", "set": {"r": 8},
               "lr": 0.002},
    "data": {"rows": 90, "heldout_rows": 700, "choosing_rows": 200, "final_rows": 500, "labels": {"0": 45, "1": 45}},
    "cost": {"trainable_parameters": 1000}, "notices": ["overfitting: held-out loss has risen"],
    "template": {"kind": "label", "prompt": "Review: {text}\nSentiment:", "answer": "label", "verbalizer": WORDS},
}  # fmt: skip
MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")
ODD = [
    "a|b", "`x`", "``", " `", "<b>x</b>", "*x* _y_ ~~z~~", "[x](y)", "![x](y)", "# x", "- x", "1. x", "+ x", "> x",
    "&lt;", "a\nb", "a\r\n\r\n# b", "\\", "\\|", "---", "===", "```\nx\n```", "{{ x }}", "{% x %}", "好|差", "", "x: y",
    "'\"", "\u2028x",
]  # fmt: skip


def story_of(**more):
    return {**STORY, **more}


def parts_of(card):
    """The YAML at the head, read, and the Markdown behind it, parsed."""
    _, head, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), MARKDOWN.parse(body)


def head_of(card):
    return parts_of(card)[0]


def text_in(tokens):
    """What a reader sees of inline tokens; whatever is markup fails."""
    for token in tokens:
        assert token.type in ("text", "text_special", "softbreak"), token
    return "".join(token.content for token in tokens)


# ---- the card


def test_hubs_read_the_card():
    head = head_of(model_card(STORY))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and head["license"] == "apache-2.0"
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-classification"
    assert {"inlay", "lora"} <= set(head["tags"]) and "language" not in head
    data = ModelCard(model_card(STORY)).data
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [("accuracy", 0.857)]
    assert data.eval_results[0].dataset_name == "a.csv" and data.eval_results[0].dataset_type == "csv"
    assert head_of(model_card(story_of(data={"languages": ["zh"]})))["language"] == ["zh"]
    assert head_of(model_card(story_of(peft_layout=False)))["library_name"] == "inlay"
    unscored = head_of(model_card(story_of(heldout={"accuracy": float("nan"), "loss": 1.0})))
    assert "model-index" not in unscored and "metrics" not in unscored


def test_the_card_says_how_good_it_is_and_on_what():
    card = model_card(STORY, command=command_of(STORY, portable=True))
    for wanted in (
        "On 500 held-out rows", "| accuracy | 0.700 (0.66–0.74) | 0.857 (0.83–0.88) |",
        "| loss | 0.600 | 0.300 (0.28–0.33) |",
        "Better than the base beyond chance: accuracy +0.157 (95 % interval 0.11–0.20), over the same 500 rows.",
        "- rows to train on: 90\n", "- rows dropped: nothing to learn: 2\n", "- rows labelled 1 (good): 45\n", "r=8",
        "40 steps of 16 rows; the best one, step 30, is kept", "overfitting",
        "1,000 parameters", "| `1` | `good`, `great` |",
        "learning rate: 0.002", "```sh\ninlay train --data a.csv --out run --set r=8 --lr 0.002\n```",
        "```\nReview: {text}\nSentiment:\n```", "rounded to 4 bits", "`apache-2.0`",
    ):  # fmt: skip
        assert wanted in card, wanted
    assert "/home/me" not in card


def test_little_is_enough_for_a_card():
    card = model_card({"config": {"base": "b"}})
    assert "No rows were held out" in card and "license is not known" in card and head_of(card)["base_model"] == "b"
    assert model_card({}) and "inlay train" not in model_card({}) and "```sh\ninlay train" not in card


def card_with(word):
    """The card of a run that holds `word` wherever words of other people go."""
    return model_card(
        story_of(
            notices=[word], template={**STORY["template"], "prompt": word, "verbalizer": {word: [word]}}, method=word,
            config={**STORY["config"], "base": word, "data": [word], "set": {"targets": word}}, dtype=word,
            data={"labels": {word: 3}}, rows={f"dropped: {word}": 1},
        )
    )  # fmt: skip


@pytest.mark.parametrize("odd", filter(None, ODD))
def test_odd_words_stay_words_in_the_card(odd):
    found, usual = parts_of(card_with(odd))[1], parts_of(card_with("tame"))[1]
    blocks = ("heading_open", "html_block", "hr", "fence", "bullet_list_open", "list_item_open", "th_open")
    assert [t.type for t in found if t.type in blocks] == [t.type for t in usual if t.type in blocks]
    kinds = {inner.type for token in found for inner in token.children or []}
    assert kinds <= {"text", "text_special", "code_inline", "softbreak"}


@pytest.mark.parametrize("odd", ODD)
def test_words_in_markdown_are_read_back_as_they_were(odd):
    listed = MARKDOWN.parse(f"- {plain(odd)}\n")
    opened = [t.type for t in listed if t.type.endswith("_open")]
    assert opened == ["bullet_list_open", "list_item_open", "paragraph_open"] or not odd
    assert not odd or text_in(next(t for t in listed if t.type == "inline").children) == " ".join(odd.split())
    table = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {code(odd)} | {plain(odd)} |\n")
    cells, lines = [t for t in table if t.type == "inline"], odd.replace("\r\n", "\n").replace("\u2028", "\n")
    assert len(cells) == 4
    if odd:
        assert cells[2].children[0].type == "code_inline"
        assert cells[2].children[0].content.strip() == lines.replace("\n", "\\n").strip()
    block = MARKDOWN.parse(f"before\n\n{fenced(odd)}\n\nbehind\n")
    assert [t.type for t in block if t.type in ("fence", "paragraph_open")] == [
        "paragraph_open",
        "fence",
        "paragraph_open",
    ]
    assert next(t for t in block if t.type == "fence").content == lines + "\n"


@pytest.mark.parametrize("kind", ["label", "completion", "messages"])
def test_the_cards_python_writes_the_same_here_and_in_peft(kind, base_folder, tmp_path, capsys):
    import inlay
    from inlay.bases.load import load_base

    base = load_base(str(base_folder), dtype="float32")
    bank = inlay.attach(base.model)
    bank.add("it", inlay.LoRA(r=2), seed=0)
    for value in bank.adapters["it"].parameters():
        value.data.normal_(0, 0.3)
    template = {**STORY["template"], "kind": kind} if kind != "messages" else {"kind": kind, "chat": True}
    bank.save("it", tmp_path)
    write_card(tmp_path, story_of(template=template, config={"base": str(base_folder), "data": ["a.csv"]}))
    card = (tmp_path / "README.md").read_text(encoding="utf8")
    name = f'"{base_folder.name}"'
    said = []
    for block in card.split("```python\n")[1:]:
        written = block.split("```")[0]
        assert name in written and '"."' in written
        written = written.replace(name, repr(str(base_folder))).replace('"."', repr(str(tmp_path)))
        exec(written.replace("load_base(", "load_base(dtype='float32', name="), {})
        said.append(capsys.readouterr().out)
    assert len(said) == 2 and said[0] == said[1] and said[0].strip()


def test_virtual_tokens_elsewhere_are_no_matter_for_peft():
    card = model_card(story_of(config={**STORY["config"], "virtual_tokens_at": "before-answer"}))
    assert "PeftModel" not in card and "`before-answer`" in card and "inlay predict --base smollm2 --adapter ." in card
    assert "PeftModel" not in model_card(story_of(peft_layout=False)) and "PeftModel" in model_card(STORY)
    assert "AutoModelForSeq2SeqLM" in model_card(STORY, "SEQ_2_SEQ_LM")


# ---- what a base is called


def test_bases_have_names_that_mean_something_elsewhere(tmp_path):
    assert named("smollm2").hub and named("org/name").name == "org/name" and named("org/name").hub
    assert named("/nowhere/my.gguf").name == "my.gguf" and not named("/nowhere/my.gguf").hub
    folder = tmp_path / "Tiny-7B"
    folder.mkdir()
    assert (named(str(folder)).name, named(str(folder)).hub) == ("Tiny-7B", False)
    (folder / "config.json").write_text('{"_name_or_path": "org/tiny-7b"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    assert named(str(folder)).name == "org/tiny-7b" and named(str(folder)).license == "mit"
    (folder / "config.json").write_text('{"_name_or_path": "org/what-it-was-made-from"}')
    assert named(str(folder)).name == "Tiny-7B"
    cached = tmp_path / "models--org--big" / "snapshots" / "0"
    cached.mkdir(parents=True)
    assert named(str(cached)).name == "org/big"


# ---- the command


@pytest.mark.parametrize(
    "more",
    [
        {}, {"set": {"r": 16, "targets": "qv", "alpha": 0.5, "rslora": True}},
        {"steps": 7, "gradient_checkpointing": True},
        {"template": "Q: {it's}\n\"A\":", "columns": {"text": "a b, c", "label": "d"}}, {"memory_limit": "none"},
        {"verbalizer": {"0": ["bad"], "1": ["good", "great"]}, "lr": 1e-5, "heldout": "test $HOME.csv"},
        {"template": "-x {text}", "data": ["a b.csv", "c;d.csv"]}, {"set": {"targets": ["q", "v"]}}, {"seed": -3},
        {"set": {"targets": "7"}},
    ],
)  # fmt: skip
def test_the_command_makes_the_same_settings_again(more):
    settings = Settings(**{"data": ["a.csv"], "out": "runs/a", **more})
    parts = shlex.split(command_of({"config": dataclasses.asdict(settings)}))
    assert parts[:2] == ["inlay", "train"]
    assert Settings(**_read(parts[2:])) == settings
    assert "--optimizer" not in parts and "--resume" not in parts


def _read(parts):
    """Flags as the command line reads them."""
    fields, given = {field.flag: field for field in fields_of(Settings)}, {}
    while parts:
        flag, mark, value = parts.pop(0).partition("=")
        field = fields[flag]
        if field.type is bool:
            given[field.name] = True
            continue
        value = value if mark else parts.pop(0)
        assert mark or not value.startswith("-")
        if field.name in ("data", "set"):
            given.setdefault(field.name, []).append(value)
        else:
            given[field.name] = read_yaml(value) if field.type in (int, float) else value
    return given


def test_a_command_for_others_names_no_folders_of_this_machine():
    config = {"data": ["/home/me/a.csv", "b/c.csv"], "out": "C:\\runs\\a", "base": "~/models/x", "template": "a/{b}"}
    command = command_of({"config": config}, portable=True)
    assert command == "inlay train --base x --data a.csv --data b/c.csv --out run --template 'a/{b}'"
    assert command_of({}) == "" and command_of({"config": {"base": "x"}}) == ""


# ---- numbers and texts


def test_intervals_have_the_decimals_that_they_are_worth():
    assert interval_text([0.831, 0.882]) == "0.83–0.88" and interval_text([-0.021, 0.043]) == "−0.02 to 0.04"
    assert interval_text([0.8571, 0.8589]) == "0.857–0.859" and interval_text([20.1, 35.2]) == "20.1–35.2"
    assert interval_text(None) == interval_text([float("nan"), 1.0]) == interval_text([1.0]) == ""
    assert (score_text(0.8571), score_text(23.412), score_text(1204.4), score_text(None)) == (
        "0.857",
        "23.41",
        "1,204",
        "–",
    )


def test_long_texts_are_cut_at_their_beginning():
    long = "one two three " * 100 + "\nQuestion: what is it?"
    cut = cut_front(long, 60)
    assert cut.startswith("… ") and cut.endswith("\nQuestion: what is it?") and len(cut) <= 62
    assert cut[2:].split()[0] in ("one", "two", "three")
    assert cut_front("short", 60) == "short" and len(cut_front("好" * 500, 60)) == 62
    assert breakable("a/b_c<.d 0.5") == "a/<wbr>b_<wbr>c&lt;.<wbr>d 0.5"
    assert (label_text("1", WORDS), label_text("x", WORDS), label_text("a", {"a": ["a"]})) == ("1 (good)", "x", "a")
