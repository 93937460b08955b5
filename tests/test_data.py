"""Data files to rows, rows to tokens: what is learned, what is cut, what is refused and how that is said."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inlay.data.choose import Columns, choose_template
from inlay.data.encode import Encoder
from inlay.data.labels import parse_verbalizer
from inlay.data.prepare import prepare
from inlay.data.table import read_table
from inlay.data.template import Template
from inlay.errors import DataError, UsageError


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"text": 'He said "no",\nthen left', "label": "0"}, {"text": "好", "label": "1"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    quoted = 'text{0}label\n"He said ""no"",\nthen left"{0}0\n好{0}1\n'
    files = [
        written(tmp_path, "a.csv", quoted.format(",")),
        written(tmp_path, "semicolon.csv", quoted.format(";")),
        written(tmp_path, "mark.csv", b"\xef\xbb\xbf" + quoted.format(",").encode()),
        written(tmp_path, "wide.csv", quoted.format(",").encode("utf-16")),
        written(tmp_path, "a.tsv", quoted.format("\t")),
        written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS))),
        written(tmp_path, "a.json", json.dumps({"version": 1, "rows": ROWS})),
    ]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for file in [*files, tmp_path / "a.parquet"]:
        table = read_table(file)
        assert [row.values for row in table.rows] == ROWS, file
    assert [row.line for row in read_table(files[0]).rows] == [2, 4]
    assert len(read_table(files[:2]).rows) == 4
    text = read_table(written(tmp_path, "a.txt", "one\ntwo\n\n\nthree\n"))
    assert [row.values["text"] for row in text.rows] == ["one\ntwo", "three"]
    assert [row.line for row in text.rows] == [1, 5]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text,label\na,0\nb\n", "line 3 has 1 fields"),
        ("a.csv", "text,label\na,0\nb,1,2\n", "line 3 has 3 fields"),
        ("a.csv", 'text,label\na,0\n"b,1\n', "line 3"),
        ("a.csv", "text,text\na,0\n", "line 1"),
        ("a.csv", b"text,label\na,0\nb\xff,1\n", "line 3 holds byte 0xff"),
        ("a.csv", b"text,label\na\x00,0\n", "line 2 holds a NUL"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 holds a list"),
        ("a.json", "3", "no list of objects"),
        ("a.parquet", "PAR1 nonsense", "not a whole parquet"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said):
        read_table(written(tmp_path, name, content))


def test_paths_that_cannot_be_data(tmp_path):
    for path, said in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "no dataset")):
        with pytest.raises(UsageError, match=said):
            read_table(path)
    with pytest.raises(UsageError, match="unknown kind"):
        read_table(written(tmp_path, "a.xyz", "1"))


def table_of(tmp_path, rows):
    return read_table(written(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))))


def learned(tokenizer, example):
    return tokenizer.decode([i for i, on in zip(example.ids, example.loss_mask, strict=True) if on])


def test_a_cloze_learns_its_word_and_the_end(tmp_path, tokenizer):
    table = table_of(tmp_path, [{"text": "a good film", "label": 1}])
    template = choose_template(
        table, Columns(), r"Review: {text}\nSentiment:", parse_verbalizer("0=negative,1=positive|good")
    )
    encoder = Encoder(tokenizer, template, 64)
    example = encoder.example(table.rows[0])
    assert tokenizer.decode(example.ids) == "Review: a good film\nSentiment: positive<|im_end|>"
    assert learned(tokenizer, example) == " positive<|im_end|>"
    choices = encoder.choices(table.rows[0])
    assert choices.label == "1" and [label for label, _ in choices.words] == ["0", "1", "1"]
    assert tokenizer.decode(choices.prompt + choices.words[0][1]) == "Review: a good film\nSentiment: negative"


def test_the_prompt_is_cut_and_the_answer_never(tmp_path, tokenizer):
    table = table_of(tmp_path, [{"text": "film " * 50, "label": 1}, {"text": "ok", "label": 0}])
    template = choose_template(table, Columns(), "Review: {text}\nSentiment:", {"0": ["negative"], "1": ["positive"]})
    prepared = prepare(Encoder(tokenizer, template, 24), table.rows)
    example = prepared.examples[0]
    assert len(example.ids) == 24 and prepared.counts["cut"] == 1
    text = tokenizer.decode(example.ids)
    assert text.startswith("Review: film") and text.endswith("\nSentiment: positive<|im_end|>")
    long = table_of(
        tmp_path, [{"prompt": "a", "completion": " answer" * 40}, {"prompt": "question " * 40, "completion": " ok"}]
    )
    prepared = prepare(Encoder(tokenizer, choose_template(long, Columns()), 20), long.rows)
    assert prepared.counts["dropped: answer too long"] == 1 and len(prepared.examples) == 1
    assert learned(tokenizer, prepared.examples[0]) == " ok<|im_end|>" and len(prepared.examples[0].ids) == 20


def test_prompts_and_completions_are_joined_as_they_are(tmp_path, tokenizer):
    table = table_of(tmp_path, [{"question": "question:", "answer": " answer"}])
    example = Encoder(tokenizer, choose_template(table, Columns()), 64).example(table.rows[0])
    assert tokenizer.decode(example.ids) == "question: answer<|im_end|>"
    assert learned(tokenizer, example) == " answer<|im_end|>"
    chat = Encoder(tokenizer, choose_template(table, Columns(), "chat"), 64).example(table.rows[0])
    assert tokenizer.decode(chat.ids).startswith("<|im_start|>user\nquestion:<|im_end|>\n<|im_start|>assistant\n")
    assert learned(tokenizer, chat) == "answer<|im_end|>\n"


def test_every_answer_of_a_conversation_is_learned(tmp_path, tokenizer):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"messages": [{"from": r, "value": c} for r, c in turns]},
    ]
    for row in rows:
        table = table_of(tmp_path, [row])
        example = Encoder(tokenizer, choose_template(table, Columns()), 64).example(table.rows[0])
        assert learned(tokenizer, example) == "two<|im_end|>\nfour<|im_end|>\n"


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"x": 1, "y": 2}], {}, "no known kind"),
        ([{"text": "a", "label": 0}], {"template": "{nothing}"}, "names 'nothing'"),
        ([{"text": "a", "label": 0}], {"template": "say"}, "names no column"),
        ([{"text": "a", "label": 0}], {"template": "{text} {label}"}, "shows the answer"),
        ([{"text": "a", "label": 0}], {"columns": Columns(text="body")}, "no column 'body'"),
    ],
)
def test_templates_that_cannot_be_are_refused(tmp_path, rows, given, said):
    table = table_of(tmp_path, rows)
    with pytest.raises(UsageError, match=said):
        choose_template(table, given.get("columns", Columns()), given.get("template"))


def test_labels_outside_the_verbalizer_and_rows_without_answers(tmp_path, tokenizer):
    table = table_of(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 7}])
    template = choose_template(table, Columns(), None, {"0": ["no"], "1": ["yes"]})
    with pytest.raises(DataError, match=r"line 2 has the label '7'.*'0', '1'"):
        prepare(Encoder(tokenizer, template, 32), table.rows)
    empty = table_of(tmp_path, [{"prompt": "a", "completion": None}])
    with pytest.raises(DataError, match=r"none of the 1 rows.*1 dropped: no answer"):
        prepare(Encoder(tokenizer, choose_template(empty, Columns()), 32), empty.rows)
    odd = table_of(tmp_path, [{"prompt": "a", "completion": 4}])
    with pytest.raises(DataError, match="line 1: column 'completion' holds no text"):
        prepare(Encoder(tokenizer, choose_template(odd, Columns()), 32), odd.rows)


def test_a_template_travels():
    template = Template("label", "{text}:", "label", {"0": ["no"]})
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))).verbalizer == {"0": ["no"]}
