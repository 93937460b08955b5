"""The words around a row's fields: the template language, joins and slots, labels, what of a row is refused or left
out.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import toks
from inlay.data.choose import Columns, check_columns, choose_template
from inlay.data.conflicts import conflict_notices
from inlay.data.encode import Choices, Encoder
from inlay.data.fields import names_in, parsed
from inlay.data.joins import parting
from inlay.data.labels import classes, label_key, label_notices, parse_verbalizer
from inlay.data.prepare import prepare
from inlay.data.split import content_key
from inlay.data.table import Row, read_table
from inlay.data.template import Template
from inlay.errors import DataError, DroppedRow, FormatError, UsageError

WORDS = {"0": ["差"], "1": ["好"]}
BAD_GOOD = {"0": ["negative"], "1": ["positive"]}


@pytest.fixture(scope="module")
def tokenizer():
    return toks.byte_level(bos_token="<s>")


def row(number=0, **values):
    return Row(values, number, "rows.jsonl", number + 1)


def table_of(tmp_path, rows, name="t.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_table(path)


def chosen(tmp_path, values, template, verbalizer=None, **columns):
    return choose_template(table_of(tmp_path, [values]), Columns(**columns), template, verbalizer)


def whole(tokenizer, example):
    return tokenizer.decode(example.ids), tokenizer.decode(
        [i for i, on in zip(example.ids, example.loss_mask, strict=True) if on]
    )


# ---- the language


@pytest.mark.parametrize(
    "name", ["review.body", "text[en]", "text:en", "my text", "wow!", "a{b}", "text!r", "0", "名", " x ", "a.b[c]:d!e"]
)
def test_columns_of_any_name_can_be_named(name):
    template = Template("label", f"It says {{{name}}}, {{{{so}}}}:", "label", BAD_GOOD)
    assert names_in(template.prompt) == {name}
    said = template.prompt_of(row(**{name: "{x} {{y}} {0} %s", "label": 1}))
    assert said == "It says {x} {{y}} {0} %s, {so}:"


@pytest.mark.parametrize("name", ["text:d", "text!z", "text:{text}", "text.upper", "text[0]", "Text", ""])
def test_formats_are_unknown_columns(name, tmp_path):
    with pytest.raises(UsageError) as error:
        chosen(tmp_path, {"text": "a", "label": 1}, f"{{{name}}}:")
    assert "\n" not in str(error.value)
    if name:
        assert f"the template names {name!r}" in str(error.value) and "Columns: text, label" in str(error.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text", "character 1 is never closed"),
        ("text}: {text}", "character 5 closes nothing"),
        ("{}", "names no column"),
    ],
)
def test_unbalanced_braces_are_named(template, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        chosen(tmp_path, {"text": "a", "label": 1}, template)


def test_any_template_can_be_written_and_read_again():
    """Words and names of any signs come back as they were put together."""
    random.seed(3)
    signs = "{}a:.![] 好\n%\\"
    for _ in range(2000):
        words = ["".join(random.choices(signs, k=random.randint(0, 4))) for _ in range(3)]
        names = [
            "".join(random.choices(signs.replace("{", "").replace("}", ""), k=random.randint(1, 4))) for _ in range(2)
        ]
        escaped = [one.replace("{", "{{").replace("}", "}}") for one in words]
        made = f"{escaped[0]}{{{names[0]}}}{escaped[1]}{{{names[1]}}}{escaped[2]}"
        assert parsed(made) == ((words[0], names[0]), (words[1], names[1]), (words[2], None))


# ---- where the answer stands


@pytest.mark.parametrize(
    ("prompt", "space"),
    [
        ("Sentiment:", " "), ("film", " "), ("5", " "), ("обзор", " "), ("κριτική", " "), ("ביקורת", " "), ("مراجعة",
        " "),
        ("समीक्षा", " "), ("리뷰", " "), ("é", " "), ("e\u0301", " "), ("电影:", " "), ("“film”", " "), ("😀", " "),
        ("", " "),
        ("电影很", ""), ("ひらがな", ""), ("カタカナ", ""), ("ｶﾅ", ""), ("รีวิว", ""), ("ລາວ", ""), ("ខ្មែរ", ""),
        ("မြန်မာ", ""),
        ("情感：", ""), ("电影。", ""), ("「好」", ""), ("“电影”", ""), ("电影…", ""), ("电影😀", ""), ("\U00020000",
        ""),
        ("Answer:\n", ""), ("Answer: ", ""), ("好\u3000", ""),
    ],
)  # fmt: skip
def test_a_space_parts_the_answer_where_the_script_has_spaces(prompt, space):
    assert parting(prompt) == space


@pytest.mark.parametrize(
    ("template", "text", "learned"),
    [
        ("{text}这部电影很{answer}", "我喜欢这部电影很好</s>", "好</s>"),
        ("{text}这部电影很", "我喜欢这部电影很好</s>", "好</s>"),
        ("{text} 总之，这部电影很{answer}。", "我喜欢 总之，这部电影很好。</s>", "好。</s>"),
        ("{text} It is {answer}, I say.", "我喜欢 It is 好, I say.</s>", " 好, I say.</s>"),
        ("{text} It is", "我喜欢 It is 好</s>", " 好</s>"),
        ("{text}{answer}{{}}", "我喜欢好{}</s>", "好{}</s>"),
    ],
)
def test_a_slot_says_where_the_answer_stands(template, text, learned, tmp_path, tokenizer):
    values = {"text": "我喜欢", "label": 1}
    made = chosen(tmp_path, values, template, WORDS)
    encoder = Encoder(tokenizer, Template.from_dict(json.loads(json.dumps(made.to_dict()))), 200)
    example = encoder.example(row(**values))
    assert whole(tokenizer, example) == (text, learned)
    choices = encoder.choices(row(**values))
    for label, ids in choices.words:
        assert tokenizer.decode([*choices.prompt, *ids]) + "</s>" == text.replace("好", WORDS[label][0])
    right = next(ids for label, ids in choices.words if label == "1")
    assert example.ids[:-1] == (*choices.prompt, *right)
    prompt, _ = encoder.prompt(row(**values))
    assert tokenizer.decode(prompt) == text[: text.index("好")].rstrip(" ")


def test_a_slot_serves_prompts_and_completions(tmp_path, tokenizer):
    values = {"prompt": "question", "completion": "answer"}
    made = chosen(tmp_path, values, "Q: {prompt} A: {answer}!")
    assert whole(tokenizer, Encoder(tokenizer, made, 99).example(row(**values))) == (
        "Q: question A: answer!</s>", " answer!</s>",
    )  # fmt: skip
    values = {"question": "q", "answer": "a"}  # the learned column is called answer
    assert chosen(tmp_path, values, "{question} -> {answer}").after_of(row(**values)) == ""
    assert chosen(tmp_path, values, "{question} -> {answer}").slot


def test_a_column_called_answer_that_is_not_learned_is_that_column(tmp_path, tokenizer):
    values = {"text": "t", "answer": "yes", "label": 1}
    made = chosen(tmp_path, values, "{text} {answer}:", BAD_GOOD)
    assert not made.slot and made.prompt_of(row(**values)) == "t yes:"
    with pytest.raises(UsageError, match="more than one"):
        chosen(tmp_path, {"text": "t", "label": 1}, "{text}{answer}{answer}")
    with pytest.raises(UsageError, match="names no column"):
        chosen(tmp_path, {"text": "t", "label": 1}, "so {answer}")


def test_templates_of_before_still_open_and_broken_ones_are_refused():
    before = {"kind": "label", "prompt": "{text}:", "answer": "label", "verbalizer": {"0": ["no"]}, "chat": False,
              "jinja": None, "short": ""}  # fmt: skip
    assert Template.from_dict(before) == Template("label", "{text}:", "label", {"0": ["no"]})
    for broken in (
        {**before, "prompt": "{text"}, {**before, "prompt": 5}, {**before, "verbalizer": [1]}, {**before, "kind": "x"},
        {**before, "verbalizer": {"0": "no"}}, {**before, "verbalizer": {"0": []}}, {**before, "chat": "yes"},
        {**before, "more": 1}, {}, [], "x", None, {**before, "jinja": 3}, {**before, "after": "}"},
        {**before, "slot": 1},
    ):  # fmt: skip
        with pytest.raises(FormatError):
            Template.from_dict(broken)  # type: ignore[arg-type]


# ---- labels


@pytest.mark.parametrize(
    "same", [[1, 1.0, "1", "1.0", True, " 1 ", "true", "True"], [0, 0.0, "0", "0.0", False, "FALSE", -0.0]]
)
def test_labels_that_mean_the_same_are_one_class(same, tokenizer):
    assert len({label_key(value) for value in same}) == 1
    template = Template("label", "{text}:", "label", BAD_GOOD)
    assert len({template.label_of(row(text="a", label=value)) for value in same}) == 1
    for key in ("1", "1.0", "true"):
        assert Template("label", "{text}:", "label", {key: ["x"]}).label_of(row(label=1)) == key


def test_other_labels_stay_what_they_are():
    values = ["007", "7", 7.0, "yes", "Yes", 0.5, "0.50", "1e5", "-3", -3, "no 1", "half-true"]
    assert classes(values) == ["-3", "0.5", "007", "1e5", "7", "Yes", "half-true", "no 1", "yes"]
    assert classes(["true", "half-true", "FALSE"]) == ["false", "half-true", "true"]
    assert classes([True, False]) == classes(["True", "False"]) == ["false", "true"]
    assert classes([True, 0, "1"]) == ["0", "1"]


@pytest.mark.parametrize(
    "labels", [[1, 0, 1], [1.0, 0.0, None], [True, False, True], ["b", "a", "b"], ["1", "0", "true"]]
)
def test_every_kind_of_file_gives_the_same_classes(labels, tmp_path):
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]
    jsonl = table_of(tmp_path, rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    written = "\n".join(f"{one['text']},{'' if one['label'] is None else one['label']}" for one in rows)
    (tmp_path / "t.csv").write_text(f"text,label\n{written}\n")
    found = []
    for table in (jsonl, read_table(tmp_path / "t.parquet"), read_table(tmp_path / "t.csv")):
        template = choose_template(table, Columns())
        own = []
        for one in table.rows:
            try:
                own.append(template.label_of(one))
            except DroppedRow as dropped:
                own.append(dropped.reason)
        found.append((dict(template.verbalizer), own))
    assert found[0] == found[1] == found[2]


def test_verbalizers_name_each_label_once():
    assert parse_verbalizer("0=no,1=yes|sure") == {"0": ["no"], "1": ["yes", "sure"]}
    for text in ("1=a,1.0=b", "1=a,true=b", "0=a,0=b", "=a", "1=", "a"):
        with pytest.raises(UsageError):
            parse_verbalizer(text)


def test_what_is_said_of_labels():
    assert label_notices({"a": 50, "b": 50}) == []
    assert "every row has the label 'a'" in label_notices({"a": 5, "b": 0})[0]
    assert "'b' has 1 of 1001" in label_notices({"a": 1000, "b": 1})[0]
    assert label_notices({}) == []


def test_labels_that_differ_in_case_only_are_named():
    (notice,) = label_notices({"Positive": 40, "negative": 50, "positive": 45})
    assert "'Positive' and 'positive'" in notice and "negative" not in notice
    assert label_notices({"Positive": 40, "positive": 0, "negative": 9}) == []
    many = label_notices({f"{word}{n}": 10 for n in range(5) for word in ("A", "a")})
    assert len(many) == 1 and "and 2 more such groups" in many[0]
    assert [("case" in one, "hardly" in one) for one in label_notices({"A": 1, "a": 500, "b": 500})] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_texts_with_different_labels_are_named():
    def said(*pairs):
        rows = [Row({"text": text, "label": label}, n, "a.csv", n + 2) for n, (text, label) in enumerate(pairs)]
        keys = np.array([content_key(text) for text, _ in pairs], np.uint64)
        return conflict_notices(rows, keys, [label for _, label in pairs])

    assert said(("good", "1"), ("bad", "0"), ("good", "1")) == []
    (one,) = said(("x", "0"), ("Good  film", "1"), ("bad", "0"), ("good film", "0"))
    assert one.startswith("1 text has") and "a.csv, line 3 ('1') and a.csv, line 5 ('0')" in one
    (two,) = said(("b", "1"), ("a", "1"), ("a", "0"), ("b", "0"), ("b", "1"), ("c", "0"))
    assert two.startswith("2 texts have") and "a.csv, line 2 ('1') and a.csv, line 5 ('0')" in two
    assert said() == []


# ---- rows that are dropped or refused

LABEL = Template("label", "Review: {text}\nSentiment:", "label", BAD_GOOD, text="text")
PAIRS = Template("completion", "{prompt}", "completion", text="prompt")
PLAIN = Template("text", answer="text")
NAN = float("nan")


@pytest.mark.parametrize(
    ("template", "values", "reason"),
    [
        (LABEL, {"text": "a", "label": None}, "no label"), (LABEL, {"text": "a", "label": NAN}, "no label"),
        (LABEL, {"text": "a", "label": ""}, "no label"), (LABEL, {"text": "a", "label": " \n"}, "no label"),
        (LABEL, {"text": None, "label": 1}, "no text"), (LABEL, {"text": NAN, "label": 1}, "no text"),
        (LABEL, {"text": "", "label": 1}, "no text"), (LABEL, {"text": " ", "label": 1}, "no text"),
        (PAIRS, {"prompt": "", "completion": ""}, "both sides empty"), (PAIRS, {"prompt": "a",
        "completion": ""}, "no answer"),
        (PAIRS, {"prompt": "a", "completion": None}, "no answer"),
        (PAIRS, {"prompt": None, "completion": "a"}, "no text"),
        (PAIRS, {"prompt": "a", "completion": "</s>"}, "no answer"),
        (PLAIN, {"text": None}, "no text"), (PLAIN, {"text": "  "}, "no text"),
        (LABEL, {"text": "a\ud800", "label": 1}, "text is not valid Unicode"),
        (PAIRS, {"prompt": "a", "completion": "\udfff b"}, "text is not valid Unicode"),
        (PLAIN, {"text": "好\udc00"}, "text is not valid Unicode"),
        (PAIRS, {"prompt": "a", "completion": "word " * 500}, "answer too long"),
    ],
)  # fmt: skip
def test_rows_of_no_use_are_dropped_with_a_reason(template, values, reason, tokenizer):
    encoder = Encoder(tokenizer, template, 64)
    good = row(1, text="fine", label=0, prompt="p", completion=" c")
    bad, kept = encoder.encode([row(**values), good])
    assert isinstance(bad, DroppedRow) and bad.reason == reason and "rows.jsonl, line 1" in str(bad)
    assert isinstance(kept, list)
    assert prepare(encoder, [row(**values), good]).counts[f"dropped: {reason}"] == 1
    with pytest.raises(DroppedRow):
        encoder.example(row(**values))


@pytest.mark.parametrize(
    ("template", "values", "said"),
    [
        (LABEL, {"text": "a", "label": [1]}, "a list is no label"), (LABEL, {"text": "a",
        "label": {"a": 1}}, "is no label"),
        (LABEL, {"text": "a"}, "the row has no column 'label'"), (LABEL, {"label": 1}, "the row has no column 'text'"),
        (LABEL, {"text": 5, "label": 1}, "column 'text' holds a number"),
        (LABEL, {"text": ["a"], "label": 1}, "holds a list"),
        (LABEL, {"text": {"a": 1}, "label": 1}, "holds an object"), (LABEL, {"text": True, "label": 1}, "no text"),
        (LABEL, {"text": "a", "label": 7}, "has the label '7'"),
        (PAIRS, {"prompt": 5, "completion": "a"}, "holds a number"),
        (PAIRS, {"prompt": "a", "completion": ["b"]}, "holds no text"),
        (PAIRS, {"prompt": "a"}, "no column 'completion'"),
        (PLAIN, {"text": 5}, "holds a number"), (PLAIN, {}, "no column 'text'"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_they_should_be_are_refused_by_line(template, values, said, tokenizer):
    encoder = Encoder(tokenizer, template, 64)
    with pytest.raises(DataError, match=said) as error:
        encoder.encode([row(text="fine", label=0, prompt="p", completion=" c"), row(1, **values)])
    assert "rows.jsonl, line 2" in str(error.value) and not isinstance(error.value, DroppedRow)


def test_numbers_beside_the_text_are_words(tokenizer):
    template = Template("label", "{rating} stars, {year}: {text}\nGood:", "label", BAD_GOOD, text="text")
    said = template.prompt_of(row(rating=4.5, year=1999, text="fine {rating}", label=1))
    assert said == "4.5 stars, 1999: fine {rating}\nGood:"
    with pytest.raises(DataError, match="holds a list"):
        template.prompt_of(row(rating=[4], year=1, text="a", label=1))
    assert template.prompt_of(row(rating=None, year=1, text="a", label=1)).startswith(" stars")


def test_missing_columns_are_named_with_their_file(tmp_path):
    table = table_of(tmp_path, [{"text": "a", "body": "b"}], "held.jsonl")
    with pytest.raises(
        DataError, match=r"held.jsonl has no column 'label', which the template needs. Its columns: text, body"
    ):
        check_columns(LABEL, table)
    check_columns(LABEL, table, answered=False)
    with pytest.raises(DataError, match="no column 'prompt'"):
        check_columns(PAIRS, table, answered=False)
    with pytest.raises(DataError, match="no column 'turns'"):
        check_columns(Template("messages", answer="turns", chat=True), table, answered=False)
    check_columns(
        Template("label", "{text}{answer}".replace("{answer}", ""), "body", BAD_GOOD, slot=True, after="{text}"), table
    )


def test_ids_beyond_the_base_are_refused(tokenizer):
    known = len(tokenizer)
    Encoder(tokenizer, PAIRS, 64, table_size=known).example(row(prompt="a", completion=" b"))
    with pytest.raises(DataError, match=r"rows.jsonl, line 1.*the base knows 200: tokenizer and base do not fit"):
        Encoder(tokenizer, PAIRS, 64, table_size=200).encode([row(prompt="question", completion=" answer")])


def test_candidates_are_scored_the_same_in_batches(tokenizer):
    rows = [row(n, text=text, label=n % 2) for n, text in enumerate(["a", "好 " * 60, "film", "很", "it's"])]
    encoder = Encoder(tokenizer, LABEL, 40)
    together = encoder.all_choices([*rows, row(9, text=None, label=1)])
    assert isinstance(together[-1], DroppedRow)
    for one, found in zip(rows, together, strict=False):
        assert isinstance(found, Choices) and found == encoder.choices(one)
        assert len(found.prompt) + max(len(ids) for _, ids in found.words) <= 40


def test_alpaca_rows_without_an_input_get_the_short_prompt(tmp_path, tokenizer):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "greet", "output": "hi"},
            {"instruction": "greet", "input": "", "output": "hi"},
            {"instruction": None, "input": "x", "output": "hi"}]  # fmt: skip
    table = table_of(tmp_path, rows)
    template = choose_template(table, Columns())
    assert "### Input:\n1 2\n" in template.prompt_of(table.rows[0])
    assert template.prompt_of(table.rows[1]) == template.prompt_of(table.rows[2])
    assert template.prompt_of(table.rows[1]).endswith("### Instruction:\ngreet\n\n### Response:\n")
    found = Encoder(tokenizer, template, 900).encode(list(table.rows))
    assert [isinstance(one, DroppedRow) for one in found] == [False, False, False, True]
