"""Where virtual tokens collide with a chat template, by templates that do it."""

from __future__ import annotations

import json

import pytest

import toks
from inlay.data.collisions import collisions
from inlay.data.encode import Encoder
from inlay.data.table import Row
from inlay.data.template import Template
from test_cli import answer, call

PLAIN = [("user", "question"), ("assistant", "answer")]
TALK = [("system", "Be brief."), *PLAIN]
LONG = [*TALK, ("user", "and then"), ("assistant", "positive")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS = "<s>" + CHATML
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
BOTH = "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML
REPEATED = (
    "{% for m in messages %}{% if m.role == 'user' and messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content }}<|im_end|>\n{% endif %}{% if m.role != 'system' or loop.length == 1 %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLDED = (  # as Llama 2's and Gemma's: the system's words stand in the user's turn
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{% endif %}"
    "{% if m.role == 'assistant' %}<|im_start|>model\n{% endif %}{{ m.content }}"
    "{% if m.role == 'system' %}\n\n{% else %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
INSIDE = FOLDED.replace(  # the user's turn opens before the system's words
    "<s>{% for m in messages %}", "<s>{% for m in messages %}{% if m.role == 'system' %}<|im_start|>user\n{% endif %}"
).replace("{% if m.role == 'user' %}", "{% if m.role == 'user' and (loop.first or messages[0].role != 'system') %}")
LATE = (  # the system's words come last, as in Mistral's
    "<s>{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HALF = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>{% endif %}")


def found(jinja, turns, place="start", virtual=True, **more):
    tokenizer = toks.byte_level(bos_token="<s>", **more)
    encoder = Encoder(tokenizer, Template("messages", answer="messages", chat=True, jinja=jinja), 400, place)
    messages = [{"role": role, "content": words} for role, words in turns]
    return {one.kind: one for one in collisions(encoder, [Row({"messages": messages}, 0, "talk", 1)], virtual)}


@pytest.mark.parametrize(
    ("jinja", "turns", "place", "kinds"),
    [
        (BOS, TALK, "start", {"before-bos"}),
        (BOS, TALK, "after-system", set()),
        (BOS, TALK, "before-answer", set()),
        (CHATML, TALK, "start", set()),  # a template without BOS
        (CHATML, TALK, "after-system", set()),
        (CHATML, PLAIN, "after-system", {"no-system-turn"}),
        (DEFAULT, PLAIN, "after-system", {"no-system-turn"}),
        (DEFAULT, TALK, "after-system", set()),
        (BOTH, TALK, "start", {"system-repeated"}),
        (BOTH, PLAIN, "start", set()),
        (REPEATED, LONG, "start", {"system-repeated"}),
        (REPEATED, TALK, "before-answer", set()),
        (INSIDE, TALK, "after-system", {"inside-turn"}),
        (INSIDE, TALK, "before-answer", set()),
        (LATE, TALK, "after-system", {"system-missed", "outside-turns"}),
        (LATE, TALK, "before-answer", set()),
        (LATE, LONG, "start", {"before-bos", "system-repeated"}),
        (HALF, TALK, "before-answer", {"inside-control"}),
        (HALF, TALK, "after-system", set()),
        (CHATML, LONG, "before-answer", {"several-answers"}),
        (CHATML, LONG, "after-system", set()),
        (CHATML, [TALK[0], *LONG], "after-system", {"several-system-turns"}),
    ],
)
def test_planted_templates_are_told_and_sound_ones_are_not(jinja, turns, place, kinds):
    assert {*found(jinja, turns, place)} == kinds


def test_without_virtual_tokens_only_the_system_turn_matters():
    assert {*found(LATE, LONG, "start", virtual=False)} == {"system-repeated"}
    assert not found(HALF, LONG, "before-answer", virtual=False)


def test_each_says_what_it_saw_and_what_helps():
    told = found(HALF, TALK, "before-answer")["inside-control"]
    assert "between '<|im_start|>' and 'assistant'" in told.what and "--template" in told.remedy
    assert "'<s>'" in found(BOS, TALK)["before-bos"].what
    assert "after-system" in found(BOS, TALK)["before-bos"].remedy
    assert "before-answer" in found(BOS, PLAIN)["before-bos"].remedy  # there is no system turn to stand behind
    assert "a system message in every row" in found(BOS, [*PLAIN, *PLAIN])["before-bos"].remedy  # of several answers
    assert "after-system" in found(CHATML, LONG, "before-answer")["several-answers"].remedy
    assert "You help." in found(DEFAULT, PLAIN, "after-system")["no-system-turn"].what
    assert "2 times" in found(REPEATED, LONG)["system-repeated"].what


def test_texts_that_open_with_bos_or_with_markup():
    known = toks.ending()
    row = Row({"prompt": "a good film", "completion": "answer", "text": "a"}, 0, "f", 1)
    plain = Template("completion", "{prompt}", "completion")
    for place, kinds in (("start", {"before-bos"}), ("after-system", set()), ("before-answer", set())):
        assert {one.kind for one in collisions(Encoder(known, plain, 50, place), [row])} == kinds
    assert not collisions(Encoder(toks.byte_level(), plain, 50), [row])  # no BOS
    marked = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    turns = Template("completion", marked, "completion")
    (told,) = collisions(Encoder(known, turns, 50, "after-system"), [row])
    assert told.kind == "outside-turns" and "'<|im_start|>'" in told.what
    opening = toks.byte_level(bos_token="<|im_start|>")  # as SmolLM2's, whose BOS opens every turn
    (told,) = collisions(Encoder(opening, turns, 50, "after-system"), [row])
    assert told.kind == "inside-control"
    assert not collisions(Encoder(opening, turns, 50, "before-answer"), [row])


def test_rows_are_counted_and_the_first_is_named():
    tokenizer = toks.byte_level()
    encoder = Encoder(tokenizer, Template("messages", answer="messages", chat=True, jinja=CHATML), 400, "after-system")
    talks = [[{"role": role, "content": words} for role, words in turns] for turns in (TALK, PLAIN, PLAIN)]
    (told,) = collisions(encoder, [Row({"messages": one}, n, "f", n + 1) for n, one in enumerate(talks)])
    assert (told.rows, told.seen, told.where) == (2, 3, "f, line 2") and "2 of 3 rows, first in f, line 2" in str(told)


def test_preview_says_it(base_folder, tmp_path):
    data, jinja = tmp_path / "talk.jsonl", tmp_path / "half.jinja"
    turns = [{"role": role, "content": words} for role, words in LONG]
    data.write_text("\n".join([json.dumps({"messages": turns})] * 4))
    jinja.write_text(HALF)
    given = ["preview", "--base", base_folder, "--data", data, "--template", jinja, "--method", "prompt"]
    told = answer(*given, "--virtual-tokens-at", "before-answer")["warnings"]
    assert {one["kind"] for one in told} == {"several-answers", "inside-control"} and all(one["remedy"] for one in told)
    assert answer(*given)["warnings"] == []
    shown = " ".join(call(*given, "--virtual-tokens-at", "before-answer").stdout.split())
    assert "warning: virtual tokens stand inside what opens a turn" in shown


def test_preview_shows_an_adapters_virtual_tokens_where_it_has_them(base_folder, tmp_path):
    data, out = tmp_path / "talk.jsonl", tmp_path / "run"
    turns = [{"role": role, "content": words} for role, words in TALK]
    data.write_text("\n".join([json.dumps({"messages": turns})] * 4))
    given = ["--base", base_folder, "--data", data]
    answer(
        "train", *given, "--heldout", data, "--out", out, "--method", "prompt", "--set", "num_virtual_tokens=3",
        "--virtual-tokens-at", "after-system", "--steps", 1,
    )  # fmt: skip
    roles = [token["role"] for token in answer("preview", *given, "--adapter", out)["shown"][0]["tokens"]]
    assert roles.count("virtual") == 3 and roles[roles.index("virtual") - 1] == "system"


def test_an_adapters_added_tokens_are_read_from_its_settings(tmp_path):
    import inlay
    from inlay.formats.added_tokens import added_tokens
    from zoo import make

    bank = inlay.attach(make("llama"))
    for name, method, told in (
        ("prompt", inlay.PromptTuning(4), (4, 0)),
        ("prefix", inlay.PrefixTuning(6), (0, 6)),
        ("lora", inlay.LoRA(), (0, 0)),
        ("both", [inlay.PromptTuning(4), inlay.PrefixTuning(6)], (4, 6)),
    ):
        bank.add(name, method)
        bank.save(name, tmp_path / name)
        assert added_tokens(tmp_path / name) == told
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "adapter_config.json").write_text(
        json.dumps({"config": {"architecture": "prefix_tuning", "prefix_length": 9}})
    )
    assert added_tokens(hub) == (0, 9)
