"""Every kind of file trains, and broken ones end in one error that names file and line."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inlay.data.choose import ALPACA_SHORT, Columns, choose_template
from inlay.data.encode import Encoder
from inlay.data.prepare import prepare
from inlay.data.table import duplicates, read_table
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
    assert Encoder(tokenizer, chat, 100).example(table.rows[0]).loss_mask[-1]


def test_items_of_a_json_list_know_their_lines(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"rows": [\n {"text": "a [ b"},\n\n {"text":\n "c"}, {"text": "d"}\n]}')
    assert [row.line for row in read_table(file).rows] == [2, 4, 5]
    file.write_text('[\n {"text": "a"},\n 7\n]')
    with pytest.raises(DataError, match="line 3 holds a number"):
        read_table(file)


HOSTILE = {
    "quote.csv": (b'text,label\n"a,1\nb,0\n', "line 2"),
    "stray.csv": (b'text,label\na,1\n"b" c,0\n', "line 3"),
    "ragged.csv": (b"text,label\na,1\nb\n", "line 3 has 1 fields where the header has 2"),
    "double.csv": (b"text,text\na,b\n", "line 1"),
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
            "line 2: column 'completion' holds",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": {"x": 1}}], "line 2: column 'completion'"),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": "words"}], "line 2: column 'messages'"),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"content": "a"}]}], "line 2"),
        ([{"text": "a"}, {"text": 5}], "line 2: column 'text' holds"),
    ],
)
def test_mixed_types_are_named_with_their_line(rows, said, tokenizer, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text(lines(rows))
    table = read_table(file)
    with pytest.raises(DataError, match=said):
        prepare(Encoder(tokenizer, choose_template(table, Columns()), 100), table.rows)


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


# ---- packed files and standard input


def piped(monkeypatch, content, terminal=False):
    stream = io.TextIOWrapper(io.BytesIO(content))
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stream)


PLAIN = {
    "rows.csv": table_text(LABELLED, ","), "rows.tsv": table_text(LABELLED, "\t"), "rows.jsonl": lines(LABELLED),
    "rows.json": json.dumps(LABELLED, indent=1), "rows.txt": "one\n\ntwo\n", "rows.md": "# one\n\ntwo\n",
}  # fmt: skip


@pytest.mark.parametrize("name", list(PLAIN))
@pytest.mark.parametrize("called", ["{}.gz", "{}.GZ", "{}"])
def test_packed_files_give_the_rows_of_plain_ones(name, called, tmp_path):
    plain, packed = tmp_path / name, tmp_path / "packed" / called.format(name.upper())
    packed.parent.mkdir()
    plain.write_text(PLAIN[name])
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    given, expected = read_table(packed), read_table(plain)
    assert [row.values for row in given.rows] == [row.values for row in expected.rows]
    assert [row.line for row in given.rows] == [row.line for row in expected.rows]
    assert given.digest == expected.digest and given.rows[0].where.startswith(str(packed))


def test_packed_files_that_are_not_whole(tmp_path):
    whole = gzip.compress(table_text(LABELLED * 900, ",").encode())
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(broken), whole[:5]):
        for name in ("a.csv.gz", "a.jsonl.gz", "a.json.gz", "a.gz"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InlayError, match=name):
                read_table(tmp_path / name)
    (tmp_path / "half.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.csv\.gz is damaged or cut off"):
        read_table(tmp_path / "half.csv.gz")
    (tmp_path / "void.csv.gz").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_table(tmp_path / "void.csv.gz")
    (tmp_path / "nothing.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="holds no rows"):
        read_table(tmp_path / "nothing.csv.gz")
    (tmp_path / "rows.parquet.gz").write_bytes(whole)
    with pytest.raises(UsageError, match=r"rows\.parquet\.gz is of an unknown kind"):
        read_table(tmp_path / "rows.parquet.gz")


def in_parquet(rows):
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), made)
    return made.getvalue()


STREAMS = {
    "csv": table_text(LABELLED, ",").encode(),
    "tsv": table_text(LABELLED, "\t").encode(),
    "jsonl": lines(LABELLED).encode(),
    "json": json.dumps(LABELLED).encode(),
    "json in lines": json.dumps(LABELLED, indent=2).encode(),
    "json inside": json.dumps({"data": LABELLED}).encode(),
    "packed": gzip.compress(lines(LABELLED).encode()),
    "wide": table_text(LABELLED, ",").encode("utf-16"),
    "parquet": in_parquet(LABELLED),
}


@pytest.mark.parametrize("kind", list(STREAMS))
def test_standard_input_and_files_without_extension_are_recognized(kind, tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(STREAMS[kind])
    piped(monkeypatch, STREAMS[kind])
    for path in ("-", tmp_path / "rows"):
        table = read_table(path)
        assert [(row.values["text"], int(row.values["label"])) for row in table.rows] == [
            (row["text"], row["label"]) for row in LABELLED
        ]
    piped(monkeypatch, STREAMS[kind])
    assert read_table("-").rows[0].where.startswith("standard input, line")


def test_one_object_and_one_column_come_from_standard_input(monkeypatch):
    piped(monkeypatch, b'{"text": "a"}')
    assert [row.values for row in read_table("-").rows] == [{"text": "a"}]
    piped(monkeypatch, b"text\na good film\n")
    assert [row.values for row in read_table("-").rows] == [{"text": "a good film"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "standard input is empty"),
        (b"some prose without a header\n", "standard input is of an unknown kind"),
        (b"text,label\na\n", "standard input, line 2 has 1 fields"),
        (b'{"text": "a"}\n{"text": \n', "standard input, line 2 is not JSON"),
        (gzip.compress(b"text,label\na,1\n", mtime=0)[:-9], "standard input"),
        (b"text,label\n\xff,1\n", "standard input, line 2 holds byte 0xff"),
    ],
)
def test_standard_input_that_is_of_no_use(content, said, monkeypatch):
    piped(monkeypatch, content)
    with pytest.raises(InlayError, match=said):
        read_table("-")


def test_a_terminal_is_no_data(monkeypatch):
    piped(monkeypatch, b"text,label\na,1\n", terminal=True)
    with pytest.raises(UsageError, match="nothing is piped"):
        read_table("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="nothing is piped"):
        read_table("-")


def test_standard_input_that_the_disk_has_no_room_for(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("inlay.data.sources.unnamed_file", Full)
    piped(monkeypatch, STREAMS["csv"])
    with pytest.raises(InlayError, match=r"cannot take the rows \(No space left.*INLAY_HOME"):
        read_table("-")


def test_a_real_pipe_is_read():
    code = "from inlay.data.table import read_table; print(len(read_table('-').rows))"
    content = table_text(LABELLED * 20_000, ",").encode()
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, timeout=120)
    assert done.stdout.split() == [b"120000"] and not done.stderr


# ---- encodings


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        ("text,label\ncafé au lait,1\n", "latin-1", "0xe9, which is not UTF-8: it looks like Latin-1/Windows-1252"),
        ("text,label\n“quoted”,1\n", "cp1252", "iconv -f WINDOWS-1252 -t UTF-8"),
        ("text,label\n这部电影很好看,1\n", "gb18030", "it looks like GB18030"),
    ],
)
def test_other_encodings_are_named(text, encoding, said, tmp_path):
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"a\.csv, line 2 holds byte") as error:
        read_table(tmp_path / "a.csv")
    assert said in str(error.value)


def test_a_bad_byte_far_into_a_file_has_its_line(tmp_path):
    good = b"text,label\n" + b"a film,1\n" * 300_000
    for name, content in (("a.csv", good), ("a.csv.gz", gzip.compress(good + b"caf\xe9,0\n"))):
        (tmp_path / name).write_bytes(content if name.endswith("gz") else content + b"caf\xe9,0\n")
        with pytest.raises(DataError, match=r"line 300002 holds byte 0xe9"):
            read_table(tmp_path / name)
    wide = "text,label\na,1\n".encode("utf-16") + b"\x00\xd8,\x00\n\x00"
    (tmp_path / "wide.csv").write_bytes(wide)
    with pytest.raises(DataError, match=r"line 3 holds byte 0x00, which is not UTF-16"):
        read_table(tmp_path / "wide.csv")


# ---- values


def test_values_of_json_come_back_as_they_were_read(tmp_path):
    odd = [
        r'{"text": "\ud800 alone", "label": NaN}', r'{"text": "a\u0000b\u2028", "label": 1e400}',
        '{"text": "", "label": -1e400}', '{"text": null, "label": true}',
        '{"b": [1, 2.5, {"z": 1, "a": [null]}], "a": {}}', '{"text": 1.0, "label": -0.0}', "{}",
        '{"text": "first", "text": "last", "label": 123456789012345678901234567890}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n\n".join(odd))
    table = read_table(tmp_path / "a.jsonl")
    assert repr([row.values for row in table.rows]) == repr([json.loads(line) for line in odd])
    assert [row.line for row in table.rows] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert table.columns == ("text", "label", "b", "a")
    assert [repr(table.rows[n].values) for n in range(8)] == [repr(row.values) for row in table.rows]
    assert math.isinf(table.rows[1].values["label"]) and len(set(table.rows.digests.tolist())) == 8


def test_columns_of_ragged_files_are_compared_as_a_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"label": 1, "text": "c"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    table = read_table([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert table.columns == ("text", "label") and table.rows[0].values == {"text": "a"}
    with pytest.raises(DataError, match=r"c\.jsonl \(text\) are not those of .*a\.jsonl \(text, label\)"):
        read_table([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])


@pytest.mark.parametrize("depth", [150, 900, 100_000])
def test_deep_nesting_is_refused_wherever_it_stands(depth, tmp_path):
    nested = "[" * depth + "]" * depth
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {nested}}}\n')
    (tmp_path / "a.json").write_text(f'[{{"text": "a"}},\n{{"text": {nested}}}]')
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(DataError, match=rf"{name}, line 2 nests too deeply"):
            read_table(tmp_path / name)
    (tmp_path / "flat.jsonl").write_text(json.dumps({"text": "[{" * 500, "turns": [{"a": [1]}] * 500}))
    assert len(read_table(tmp_path / "flat.jsonl").rows[0].values["turns"]) == 500


def test_parquet_values_become_plain_ones(tmp_path):
    rows = [
        {
            "day": date(2020, 1, 2), "moment": datetime(2020, 1, 2, 3, 4, 5), "price": Decimal("1.50"),
            "raw": b"caf\xc3\xa9", "count": None, "share": 0.5, "text": None,
            "turns": [{"role": "user", "content": "a", "when": date(2020, 1, 2)}],
        },
        {
            "day": None, "moment": None, "price": None, "raw": None, "count": 3, "share": math.inf, "turns": None,
            "text": "好",
        },
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = (row.values for row in read_table(tmp_path / "a.parquet").rows)
    assert first["day"] == "2020-01-02" and first["moment"].startswith("2020-01-02 03:04:05")
    assert first["price"] == "1.50" and first["raw"] == "café" and first["count"] is None and first["text"] is None
    assert first["turns"] == [{"role": "user", "content": "a", "when": "2020-01-02"}]
    assert second["count"] == 3 and second["share"] == math.inf and second["text"] == "好" and second["turns"] is None
    coded = pa.table({"label": pa.array(["a", "b", "a"]).dictionary_encode(), "n": pa.array([1, 2, 3], pa.int8())})
    pq.write_table(coded, tmp_path / "coded.parquet")
    assert [row.values for row in read_table(tmp_path / "coded.parquet").rows][2] == {"label": "a", "n": 3}
    pq.write_table(pa.table({"text": ["a"], "image": [b"\xff\xd8\xff"]}), tmp_path / "image.parquet")
    with pytest.raises(DataError, match=r"image\.parquet: column 'image' holds binary"):
        read_table(tmp_path / "image.parquet")


# ---- lists in .json


def test_a_list_is_read_across_blocks(tmp_path, monkeypatch):
    rows = [{"text": f"row {n}" * (n % 7), "n": n * 1.5, "more": [{"n": n}]} for n in range(300)]
    for text in (json.dumps(rows), json.dumps(rows, indent=3), json.dumps({"a": 12, "rows": rows, "b": 3.25})):
        (tmp_path / "a.json").write_text(text)
        whole = read_table(tmp_path / "a.json")
        monkeypatch.setattr("inlay.data.jsonlist.BLOCK", 7)
        pieces = read_table(tmp_path / "a.json")
        monkeypatch.undo()
        assert [row.values for row in pieces.rows] == [row.values for row in whole.rows] == rows
        assert [row.line for row in pieces.rows] == [row.line for row in whole.rows]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1} {"a": 2}]', "line 1 is not JSON"),
        ('[{"a": 1},\n\n,{"a": 2}]', "line 3 is not JSON"),
        ('[{"a": 1}]\n[]', "line 2 is not JSON .Extra data"),
        ('[{"a": 1}', "line 1 is not JSON"),
        ('{"a": [{"b": 1}]', "line 1 is not JSON"),
        ('{"a": [{"b": 1}], "c": [{"b": 1}]}', "holds several lists"),
        ('{"a": [{"b": 1}], 3: 4}', "is not JSON"),
        ('{"a": {"b": 1}}', "holds no list of objects"),
        ('[{"a": 1},\n[2]]', "line 2 holds a list"),
        ("[]", "holds no rows"),
        ('{"rows": []}', "holds no rows"),
        ("[{}, nonsense]", "is not JSON"),
        ('[{"a": "\0"}]', "NUL"),
    ],
)
def test_lists_that_cannot_be_rows(content, said, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_table(tmp_path / "a.json")


def test_lines_of_objects_may_be_called_json(tmp_path):
    (tmp_path / "a.json").write_text("\n" + lines(LABELLED))
    assert [row.values for row in read_table(tmp_path / "a.json").rows] == LABELLED


# ---- plain text


def test_text_is_split_as_one_says(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\ntwo\r\n\r\n \r\n  three\u2028\r\n".encode())
    found = {kind: [(r.line, r.values["text"]) for r in read_table(file, kind).rows] for kind in ("paragraph", "line")}
    assert found["paragraph"] == [(1, "one\ntwo"), (5, "  three\u2028")]
    assert found["line"] == [(1, "one"), (2, "two"), (5, "  three\u2028")]
    whole = read_table(file, "whole").rows
    assert len(whole) == 1 and whole[0].values["text"] == "one\ntwo\n\n \n  three\u2028"
    with pytest.raises(UsageError, match=r"'word'.*paragraph, line, whole"):
        read_table(file, "word")
    (tmp_path / "b.txt").write_text(" \n\n")
    for kind in found:
        with pytest.raises(DataError, match="holds no rows"):
            read_table(tmp_path / "b.txt", kind)


def test_many_lines_in_one_row_are_said(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a film\n" * 40)
    table = read_table(file)
    assert len(table.rows) == 1 and table.notices == (f"{file} is one row of 40 lines: --split line takes each line",)
    assert not read_table(file, "line").notices and len(read_table(file, "line").rows) == 40
    for name, content in (("b.txt", "a film\n" * 40 + "\n\nanother"), ("c.txt", "a\nb\n"), ("d.md", "a film\n" * 40)):
        (tmp_path / name).write_text(content)
        assert not read_table(tmp_path / name).notices


# ---- paths


def test_paths_are_checked_before_anything_is_read(tmp_path):
    file = tmp_path / "A.CSV"
    file.write_text(table_text(LABELLED, ","))
    assert len(read_table(file).rows) == 6
    for twice in ([file, file], [file, tmp_path / "." / "A.CSV"]):
        with pytest.raises(UsageError, match="is named twice"):
            read_table(twice)
    with pytest.raises(UsageError, match=r"holds no dataset, but files\. Name them: --data .*A\.CSV"):
        read_table(tmp_path)
    (tmp_path / "prose").write_text("Once upon a time there was a film.\n")
    with pytest.raises(UsageError, match=r"prose is of an unknown kind.*\.csv.*\.gz"):
        read_table(tmp_path / "prose")
    (tmp_path / "table.csv").write_bytes(b"PK\x03\x04" + bytes(80))
    with pytest.raises(DataError, match="zip archive or an Excel workbook"):
        read_table(tmp_path / "table.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UsageError, match="--data - reads standard input"):
        read_table(tmp_path / "pipe.csv")


def test_names_that_cannot_be_files(tmp_path, monkeypatch):
    for name in ("a\0b.csv", "a" * 5000 + ".csv", ""):
        with pytest.raises(UsageError):
            read_table(name)
    with pytest.raises(UsageError, match="no data file is named"):
        read_table([])
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(UsageError, match="does not exist"):
        read_table(tmp_path / "loop.csv")
    piped(monkeypatch, STREAMS["csv"])
    with pytest.raises(UsageError, match="- is named twice"):
        read_table(["-", "-"])


@pytest.mark.parametrize(
    "kind", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.csv.gz", "a.json.gz", "a", "a.parquet", "set"]
)
def test_damage_anywhere_ends_in_rows_or_one_clear_error(kind, tmp_path):
    rows = [{"text": f'a film, "{n}" 好', "label": n % 2, "more": [{"n": n}]} for n in range(40)]
    flat = table_text([{"text": f"a film, number {n} é", "label": n} for n in range(40)], ",").encode()
    made = {
        "a.csv": flat, "a.jsonl": lines(rows).encode(), "a.json": json.dumps(rows, indent=1).encode(), "a.txt": flat,
        "a.csv.gz": gzip.compress(flat), "a.json.gz": gzip.compress(json.dumps(rows).encode()),
        "a": lines(rows).encode("utf-16"), "a.parquet": in_parquet(rows), "set": b"",
    }  # fmt: skip
    path = file = tmp_path / kind
    if kind == "set":
        save_dataset(path, rows)
        file = next(path.glob("*.arrow"))
    whole, draw = made[kind] or file.read_bytes(), random.Random(kind)
    assert file.write_bytes(whole) and read_table(path)
    for _ in range(120):
        broken = bytearray(whole)
        for _ in range(draw.choice([1, 1, 3])):
            place = draw.randrange(len(broken))
            broken[place : place + draw.choice([0, 1, 1, 9])] = draw.randbytes(draw.choice([0, 1, 1, 4]))
        file.write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        try:
            list(read_table(path).rows)
        except InlayError as error:
            assert "\n" not in str(error)


def test_a_file_of_a_long_row_is_whole(tmp_path):
    long = "a film, and another; " * 500_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",1\nb,0\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long, "label": "1"}) + '\n{"text": "b", "label": "0"}\n')
    (tmp_path / "a.json").write_text(json.dumps([{"text": long, "label": "1"}, {"text": "b", "label": "0"}]))
    for name in ("a.csv", "a.jsonl", "a.json"):
        rows = read_table(tmp_path / name).rows
        assert [row.values for row in rows] == [{"text": long, "label": "1"}, {"text": "b", "label": "0"}]


# ---- folders that `datasets` saved


def test_only_the_files_of_the_dataset_are_read(tmp_path):
    save_dataset(tmp_path / "saved", LABELLED)
    shard = next((tmp_path / "saved").glob("*.arrow"))
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(shard.read_bytes())  # as `datasets` leaves what it maps
    assert len(read_table(tmp_path / "saved").rows) == len(LABELLED)
    (tmp_path / "saved" / "state.json").unlink()
    assert len(read_table(tmp_path / "saved").rows) == len(LABELLED)


def test_a_dataset_that_lacks_a_file_or_its_list_is_refused(tmp_path):
    save_dataset(tmp_path / "saved", LABELLED)
    shard = next((tmp_path / "saved").glob("*.arrow"))
    shard.rename(tmp_path / "saved" / "other.arrow")
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read \(No such file"):
        read_table(tmp_path / "saved")
    for text in ("{", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}'):
        (tmp_path / "saved" / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"state\.json does not list"):
            read_table(tmp_path / "saved")


def test_a_data_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    save_dataset(tmp_path / "saved", LABELLED)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(UsageError, match=r"data folder .*saved cannot be read \(Permission denied\)"):
        read_table(tmp_path / "saved")
