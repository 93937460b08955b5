"""Every kind of file trains, and broken ones end in one error that names file and line."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inlay.data.encode import Encoder
from inlay.data.table import duplicates, read_table
from inlay.data.template import ALPACA_SHORT, Columns, choose_template
from inlay.errors import DataError, InlayError, UsageError
from test_cli import answer

LABELLED = [{"text": f"a film, number {n}", "label": n % 2} for n in range(6)]
ASKED = [{"instruction": "question", "input": "film" if n % 2 else "", "output": "answer"} for n in range(4)]
SHARED = [{"conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]}] * 4


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def table_text(rows, mark):
    return "\n".join([mark.join(rows[0]), *(mark.join(f'"{v}"' for v in row.values()) for row in rows)]) + "\n"


def save_dataset(path, rows, splits=None):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(rows)
    (datasets.DatasetDict(dict.fromkeys(splits, made)) if splits else made).save_to_disk(str(path))
    return path


KINDS = {
    "comma.csv": lambda p: p.write_text(table_text(LABELLED, ",")),
    "semicolon.csv": lambda p: p.write_text(table_text(LABELLED, ";")),
    "tab.tsv": lambda p: p.write_text(table_text(LABELLED, "\t")),
    "crlf.csv": lambda p: p.write_bytes(table_text(LABELLED, ",").replace("\n", "\r\n").encode()),
    "mark.csv": lambda p: p.write_bytes(b"\xef\xbb\xbf" + table_text(LABELLED, ",").encode()),
    "wide.csv": lambda p: p.write_bytes(table_text(LABELLED, ",").encode("utf-16")),
    "lines.jsonl": lambda p: p.write_text(lines(LABELLED)),
    "list.json": lambda p: p.write_text(json.dumps(LABELLED, indent=1)),
    "inside.json": lambda p: p.write_text(json.dumps({"version": 1, "data": LABELLED})),
    "rows.parquet": lambda p: pq.write_table(pa.Table.from_pylist(LABELLED), p),
    "alpaca.json": lambda p: p.write_text(json.dumps(ASKED)),
    "short.jsonl": lambda p: p.write_text(lines([{"instruction": "question", "output": "answer"}] * 4)),
    "shared.jsonl": lambda p: p.write_text(lines(SHARED)),
    "pairs.csv": lambda p: p.write_text(table_text([{"Prompt": "question", "Completion": " answer"}] * 4, ",")),
    "plain.txt": lambda p: p.write_text("a good film\n\na bad film,\nof two lines\n"),
    "folder": lambda p: save_dataset(p, LABELLED),
    "splits": lambda p: save_dataset(p, LABELLED, ["train", "test"]),
    "one": lambda p: save_dataset(p, SHARED, ["validation"]),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_file_trains(name, base_folder, tmp_path):
    path = tmp_path / name
    KINDS[name](path)
    out = tmp_path / "run"
    result = answer("train", "--base", base_folder, "--data", path, "--out", out, "--steps", 1, "--heldout", path)
    assert result["tokens"] > 0 and result["heldout"]["loss"] > 0


def test_several_files_are_one_table_and_must_agree(tmp_path):
    a, b, c = tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "c.csv"
    a.write_text(table_text(LABELLED, ","))
    b.write_text(lines(LABELLED))
    c.write_text("text,stars\nx,1\n")
    table = read_table([a, b])
    assert [row.number for row in table.rows] == list(range(12)) and table.rows[6].where == f"{b}, line 1"
    with pytest.raises(DataError, match=r"c\.csv \(text, stars\) are not those of .*a\.csv"):
        read_table([a, c])


def test_equal_rows_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines([*LABELLED, *LABELLED[:2], LABELLED[0]]))
    assert duplicates(read_table(file).rows) == 3


def test_labels_of_any_type_are_words(tmp_path):
    for values in ([0, 1], [0.0, 1.0], ["0", "1"], [False, True]):
        file = tmp_path / "a.jsonl"
        file.write_text(lines([{"text": "a", "label": v} for v in values]))
        table = read_table(file)
        template = choose_template(table, Columns(), None, {"0": ["bad"], "1": ["good"]})
        assert [template.label_of(row) for row in table.rows] == ["0", "1"]


def test_alpacas_prompt_is_shorter_without_an_input(tokenizer, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ASKED))
    table = read_table(file)
    template = choose_template(table, Columns())
    assert template.prompt_of(table.rows[0]) == ALPACA_SHORT.format(instruction="question")
    assert "### Input:\nfilm" in template.prompt_of(table.rows[1])
    chat = choose_template(table, Columns(), "chat")
    assert [chat.prompt_of(row) for row in table.rows[:2]] == ["question", "question\n\nfilm"]
    assert Encoder(tokenizer, chat, 100).example(table.rows[0]).learned[-1]


def test_items_of_a_json_list_know_their_lines(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"rows": [\n {"text": "a [ b"},\n\n {"text":\n "c"}, {"text": "d"}\n]}')
    assert [row.line for row in read_table(file).rows] == [2, 4, 5]
    file.write_text('[\n {"text": "a"},\n 7\n]')
    with pytest.raises(DataError, match="line 3 holds a int"):
        read_table(file)


HOSTILE = {
    "quote.csv": (b'text,label\n"a,1\nb,0\n', "line 2"),
    "stray.csv": (b'text,label\na,1\n"b" c,0\n', "line 3"),
    "ragged.csv": (b"text,label\na,1\nb\n", "line 3 has 1 fields where the header has 2"),
    "double.csv": (b"text,text\na,b\n", "line 1"),
    "nameless.csv": (b"text,\na,b\n", "line 1"),
    "nul.csv": (b"text,label\na,1\nb\x00,0\n", "line 3 holds a NUL byte"),
    "latin.csv": ("text,label\na,1\ncafé,0\n".encode("latin-1"), "line 3 holds byte 0xe9"),
    "empty.csv": (b"", "is empty"),
    "header.csv": (b"text,label\n", "holds no rows"),
    "half.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2 holds a list"),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", "line 1"),
    "deep.json": (b"[" * 200_000, "deep.json"),
    "comma.json": (b'[{"text": "a"},\n]', "line 2 is not JSON|line 1 is not JSON"),
    "word.json": (b'"text"', "holds no list"),
    "half.parquet": (b"PAR1 and then nothing", "not a whole parquet file"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_end_in_one_clear_error(name, tmp_path):
    content, said = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_table(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
            "line 2: column 'completion' holds no text",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "line 2: column 'completion'"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": {"x": 1}}], "line 2: column 'completion'"),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": "words"}], "line 2: column 'messages'"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "line 1 holds a message without role and content"),
        ([{"text": "a"}, {"text": 5}], "line 2: column 'text' holds no text"),
    ],
)
def test_mixed_types_are_named_with_their_line(rows, said, tokenizer, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text(lines(rows))
    table = read_table(file)
    with pytest.raises(DataError, match=said):
        Encoder(tokenizer, choose_template(table, Columns()), 100).examples(table.rows)


def test_fields_with_quotes_and_newlines_are_whole(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('text,label\n"he said ""no"",\nand left",1\nb,0\n')
    rows = read_table(file).rows
    assert rows[0].values["text"] == 'he said "no",\nand left' and [row.line for row in rows] == [2, 4]


def test_a_huge_line_is_refused_or_read_soon(tmp_path):
    file = tmp_path / "huge.csv"
    file.write_bytes(b"text,label\n" + b"a" * (80 * 2**20) + b",1\n")
    with pytest.raises(DataError, match="line 2"):
        read_table(file)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "void").mkdir()
    for name, said in (("pipe.csv", "no ordinary file"), ("void", "no dataset"), ("none.csv", "does not exist")):
        with pytest.raises(UsageError, match=said):
            read_table(tmp_path / name)
    save_dataset(tmp_path / "parts", LABELLED, ["a", "b"])
    with pytest.raises(InlayError, match=r"holds the splits a, b\. Name one: .*parts/a"):
        read_table(tmp_path / "parts")
    assert len(read_table(tmp_path / "parts" / "b").rows) == 6
