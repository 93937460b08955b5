"""What is shown of a row is what the model gets of it."""

from __future__ import annotations

import json

import pytest

import toks
from inlay.data.chat import Chat
from inlay.data.encode import Encoder
from inlay.data.prepare import prepare
from inlay.data.preview import pieces, preview_row
from inlay.data.table import Row
from inlay.data.template import Template
from inlay.errors import DataError, UsageError
from test_cli import answer, call

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "positive"},
]


def encoder_of(tokenizer, place="start", length=200, **more):
    return Encoder(tokenizer, Template("messages", answer="messages", chat=True, **more), length, place)


def row(turns=TALK):
    return Row({"messages": turns}, 0, "talk.jsonl", 7)


def words(view, role=None, learned=None):
    return "".join(t.text for t in view.tokens if role in (None, t.role) and learned in (None, t.learned))


def test_roles_loss_and_special_tokens(tokenizer):
    view = preview_row(encoder_of(tokenizer), row())
    assert words(view, "system") == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert words(view, "user").count("<|im_start|>user") == 2
    assert words(view, learned=True) == "answer<|im_end|>\npositive<|im_end|>\n"
    assert {t.role for t in view.tokens if t.learned} == {"assistant"}
    assert {t.text for t in view.tokens if t.special} == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [
        ("start", "", "<|im_start|>"),
        ("after-system", "brief.<|im_end|>\n", "<|im_start|>user"),
        ("before-answer", "assistant\n", "answer"),
    ],
)
def test_virtual_tokens_stand_where_they_are_put(place, before, after, tokenizer):
    view = preview_row(encoder_of(tokenizer, place), row(), virtual=3)
    at = [n for n, token in enumerate(view.tokens) if token.role == "virtual"]
    assert at == list(range(at[0], at[0] + 3)) and not any(view.tokens[n].learned for n in at)
    assert "".join(t.text for t in view.tokens[: at[0]]).endswith(before)
    assert "".join(t.text for t in view.tokens[at[-1] + 1 :]).startswith(after)


@pytest.mark.parametrize("length", [15, 20, 25])
def test_a_cut_row_keeps_its_answers_and_places(length, tokenizer):
    whole = preview_row(encoder_of(tokenizer), row())
    view = preview_row(encoder_of(tokenizer, "before-answer", length + 22), row(), virtual=2)
    cut = preview_row(encoder_of(tokenizer, "after-system", length + 22), row(), virtual=2)
    assert view.cut == len(whole.tokens) - length - 22
    assert words(view, learned=True) == words(whole, learned=True)
    at = next(n for n, t in enumerate(view.tokens) if t.role == "virtual")
    assert view.tokens[at + 2].learned
    assert sum(t.role == "virtual" for t in cut.tokens) == 2


def test_the_place_of_a_prompt_is_that_of_training(tokenizer):
    for place in ("start", "after-system", "before-answer"):
        encoder = encoder_of(tokenizer, place)
        asked, where = encoder.prompt(row(TALK[:3]))
        example = encoder.example(row(TALK[:3]))
        assert example.ids[: len(asked)] == tuple(asked) and where == example.virtual_at
        labelled = Encoder(tokenizer, Template("label", "{text}:", "label", {"0": ["bad"], "1": ["good"]}), 50, place)
        one = Row({"text": "a film", "label": 1}, 0, "f", 1)
        assert labelled.choices(one).virtual_at == labelled.example(one).virtual_at == labelled.prompt(one)[1]


def test_labels_in_a_chat_template_are_scored_as_they_are_trained(tokenizer):
    template = Template("label", "{text}", "label", {"0": ["negative"], "1": ["positive"]}, chat=True)
    encoder = Encoder(tokenizer, template, 100)
    one = Row({"text": "a film", "label": 1}, 0, "f", 1)
    choices, example = encoder.choices(one), encoder.example(one)
    assert example.ids[: len(choices.prompt)] == choices.prompt
    right = next(ids for label, ids in choices.words if label == "1")
    assert example.ids[len(choices.prompt) :][: len(right)] == right


NO_ANSWER = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("jinja", "said"),
    [
        (NO_ANSWER, "hides the answer of turn 3"),
        (NO_END, "no end token behind the answer of turn 3"),
        (STRICT, "System role not supported"),
    ],
)
def test_templates_that_would_spoil_a_run_are_refused_with_the_row(jinja, said, tokenizer):
    with pytest.raises(DataError, match=said) as error:
        prepare(encoder_of(tokenizer, jinja=jinja), [row()])
    assert "talk.jsonl, line 7" in str(error.value)


def test_templates_that_take_thoughts_out_of_earlier_answers_are_not(tokenizer):
    view = preview_row(encoder_of(tokenizer, jinja=THINKING), row())
    assert words(view, learned=True) == "answer<|im_end|><think>\n\n</think>\n\npositive<|im_end|>\n"


def test_a_broken_template_and_a_missing_one_are_said(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="line 1"):
        Chat(tokenizer, "{% for m in messages %}")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    with pytest.raises(UsageError, match="no chat template"):
        encoder_of(bare)
    encoder_of(bare, jinja=THINKING)


def test_a_jinja_file_travels_with_the_adapter(base_folder, tmp_path):
    data, jinja = tmp_path / "talk.jsonl", tmp_path / "own.jinja"
    data.write_text("\n".join([json.dumps({"messages": TALK})] * 4))
    jinja.write_text(THINKING)
    out = tmp_path / "run"
    answer(
        "train",
        "--base",
        base_folder,
        "--data",
        data,
        "--template",
        jinja,
        "--out",
        out,
        "--steps",
        1,
        "--heldout",
        data,
    )
    told = answer("preview", "--base", base_folder, "--data", data, "--adapter", out / "adapter")
    learned = "".join(t["text"] for t in told["shown"][0]["tokens"] if t["learned"])
    assert learned.startswith("answer<|im_end|><think>")
    answer(
        "generate", "--base", base_folder, "--adapter", out / "adapter", "--prompt", "question", "--max-new-tokens", 2
    )


def test_the_command_shows_rows_and_counts(base_folder, tmp_path):
    data = tmp_path / "talk.jsonl"
    lines = [{"messages": TALK}, {"messages": TALK}, {"messages": TALK[:2]}]
    data.write_text("\n".join(map(json.dumps, lines)))
    given = ["preview", "--base", base_folder, "--data", data]
    told = answer(*given, "--rows", 3, "--method", "prompt", "--set", "num_virtual_tokens=5")
    assert told["counts"] == {"rows": 3, "cut": 0, "dropped: nothing to learn": 1, "duplicates": 1}
    assert [t["role"] for t in told["shown"][0]["tokens"][:6]] == ["virtual"] * 5 + ["system"]
    assert told["shown"][2]["dropped"] == "nothing to learn"
    plain = call(*given, "--row", 2).stdout
    assert "this row is dropped" in plain and "roles: system user" in plain and "talk.jsonl, line 3" in plain
    assert "[answer]" in call(*given).stdout.replace("][", "") or "[" in call(*given).stdout
    assert "keys of the prefix" in call(*given, "--method", "prefix").stdout
    for wrong in (
        ["--row", 9],
        ["--method", "prefix", "--virtual-tokens-at", "before-answer"],
        ["--virtual-tokens-at", "x"],
    ):
        call(*given, *wrong, code=2)


def test_virtual_tokens_before_the_answer_train_and_are_used_there(base_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"question {n}", "completion": " answer"}) for n in range(8)))
    out = tmp_path / "run"
    given = ["--base", base_folder, "--data", data, "--dtype", "float32"]
    result = answer(
        "train", *given, "--out", out, "--method", "prompt", "--set", "num_virtual_tokens=4", "--steps", 30,
        "--lr", 0.1,
        "--virtual-tokens-at", "before-answer", "--heldout", data, "--batch-size", 4,
    )  # fmt: skip
    assert result["heldout"]["loss"] < result["heldout_base"]["loss"]
    again = answer("eval", *given, "--adapter", out / "adapter")
    assert again["adapters"][str(out / "adapter")]["loss"] == pytest.approx(result["heldout"]["loss"], abs=1e-4)
    assert json.loads((out / "adapter" / "inlay.json").read_text())["virtual_tokens_at"] == "before-answer"
    call("train", *given, "--out", tmp_path / "b", "--virtual-tokens-at", "before-answer", code=2)


SIGNS = ["很", "好看", "😀", "👩‍👩‍👧", "e\u0301", "न\u093c", "👍🏽", "é", "한"]


@pytest.mark.parametrize("kind", [toks.byte_level, toks.llama_like])
def test_characters_of_several_tokens_are_shown_whole(kind):
    known = kind()
    template = Template("label", "{text}这部电影很", "label", {"0": ["差"], "1": ["妙"]})
    for sign in SIGNS:
        one = Row({"text": f"film {sign}, good {sign}{sign}.", "label": 1}, 0, "f", 1)
        encoder = Encoder(known, template, 200)
        view = preview_row(encoder, one)
        words = "".join(t.text for t in view.tokens if not t.part and not t.special)
        assert words.removeprefix(" ") == f"{one.values['text']}这部电影很妙"
        assert not any("⟨" in t.text or "\ufffd" in t.text for t in view.tokens)
        assert [t.id for t in view.tokens] == list(encoder.example(one).ids)
        assert {t.text for t in view.tokens if t.part} <= {"·"}
        assert "".join(t.text for t in view.tokens if t.learned and not t.part) == "妙</s>"
        assert {"text", "id", "part"} <= set(view.to_dict()["tokens"][0])


def test_bytes_that_are_no_character_are_shown_as_such():
    known = toks.byte_level()
    ids = known("好", add_special_tokens=False)["input_ids"]
    broken = (
        pieces(known, [*ids[:1], *known("a")["input_ids"]])
        if len(ids) > 1
        else pieces(known, [known("Ġ")["input_ids"][0]])
    )
    assert broken[0][0].startswith("⟨") and broken[-1][1] is False


def test_what_stands_behind_the_answer_is_shown_as_learned():
    template = Template("label", "{text} 总之，很", "label", {"0": ["差"], "1": ["好"]}, slot=True, after="。({text})")
    view = preview_row(Encoder(toks.byte_level(), template, 200), Row({"text": "电影", "label": 1}, 0, "f", 1))
    assert "".join(t.text for t in view.tokens if t.learned and not t.part) == "好。(电影)</s>"


def test_dropped_rows_and_long_texts_are_shown_as_what_they_become():
    known = toks.byte_level()
    text = Encoder(known, Template("text", answer="text"), 20)
    view = preview_row(text, Row({"text": "a good film " * 30}, 0, "f", 1))
    assert view.pieces > 2 and view.cut == 0 and len(view.tokens) <= 20 and not view.dropped
    assert preview_row(text, Row({"text": None}, 0, "f", 1)).dropped == "no text"
    pairs = Encoder(known, Template("completion", "{prompt}", "completion"), 20)
    view = preview_row(pairs, Row({"prompt": "a", "completion": "film " * 90}, 0, "f", 1))
    assert view.dropped == "answer too long" and view.tokens
