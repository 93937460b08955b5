"""Rows and examples on disk: what comes back, in which order, what memory they take, and what becomes of the files."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from inlay.data import mapped
from inlay.data.encode import PIECE, Encoder, Example
from inlay.data.prepare import Examples, prepare, token_counts
from inlay.data.rows import Row, Rows, Store, as_rows, duplicates, shuffled
from inlay.data.table import read_table
from inlay.data.template import Template
from inlay.errors import DataError, DroppedRow, InlayError

ODD = [
    {"text": "a film", "label": 1}, {"label": 1, "text": "a film"}, {"text": "\ud800\x00\n\"\\", "n": -0.0}, {},
    {"n": math.inf, "m": -math.inf, "big": 10**40, "yes": True, "no": None},
    {"名": ["好", {"b": [], "a": {"z": 1, "y": 2}}]},
    {"text": "", "": ""}, {"text": "a film", "label": "1"}, {"text": "a film", "label": 1.0},
]  # fmt: skip


def stored(values, file="a.jsonl"):
    store = Store()
    for n, each in enumerate(values):
        store.add(each, file, n + 1)
    return store.rows()


def numbered(count):
    rng = random.Random(1)
    return [{"text": f"film {n}: " + "word " * rng.randrange(12), "label": str(n % 2)} for n in range(count)]


# ---- rows


def test_values_come_back_as_they_were():
    rows = stored(ODD)
    assert repr([row.values for row in rows]) == repr(ODD)
    assert repr([rows[n].values for n in range(len(ODD))]) == repr(ODD)
    assert math.isnan(stored([{"n": math.nan}])[0].values["n"])


def test_rows_of_equal_content_have_equal_digests():
    rows = stored(ODD)
    assert [bytes(d) for d in rows.digests.tolist()] == [row.digest for row in rows]
    assert len({row.digest for row in rows}) == len(ODD) - 1 == len(np.unique(rows.digests))
    assert duplicates(rows) == duplicates(list(rows)) == 1


@pytest.mark.parametrize("small", [mapped.SMALL, 100])
def test_views_see_the_rows_that_they_name(small, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", small)
    values = numbered(10_000)
    rows = stored(values)
    listed = list(rows)
    assert [row.values for row in listed] == values and [row.number for row in listed] == list(range(10_000))
    assert listed[77] == Row(values[77], 77, "a.jsonl", 78) == rows[77] == rows[np.int64(77)] == rows[-9923]
    for view, same in (
        (rows[10:9000:7], listed[10:9000:7]),
        (rows[::-1][:5000], listed[::-1][:5000]),
        (rows.take([5, 3, 3, 9999]), [listed[n] for n in (5, 3, 3, 9999)]),
        (rows.take(np.arange(10_000) % 3 == 1)[4:].take([0, 2]), [listed[13], listed[19]]),
        (rows.take([]), []),
    ):
        assert isinstance(view, Rows) and list(view) == same and view == same and len(view) == len(same)
        assert view.numbers.tolist() == [row.number for row in same]
        assert view.digests.tolist() == [row.digest for row in same]
    assert rows != listed[:-1] and rows[:3] != listed[1:4] and rows != 3
    assert [row.number for row in rows[::-1].numbered([4, 9, 20_000])] == [9, 4]
    for place in (10_000, -10_001):
        with pytest.raises(IndexError):
            rows[place]


def test_rows_made_in_memory_are_seen_the_same_way():
    listed = [Row({"text": f"a film {n}", "odd": {1, 2}}, 100 + n, "made", n) for n in range(50)]
    rows = as_rows(listed)
    assert as_rows(rows) is rows and list(rows) == listed and rows[7] is listed[7]
    assert rows.take([3, 1]).numbers.tolist() == [103, 101] and rows.numbered([104]) == [listed[4]]
    assert not len(as_rows([])) and list(as_rows([])) == [] and not duplicates([])


def test_rows_of_several_files_know_their_own(tmp_path):
    for n, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": f"{name} {m}"}) for m in range(n * 3000 + 1)))
    rows = read_table([tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]).rows
    assert len(rows) == 1 + 3001 + 6001
    assert all(row.values["text"] == f"{os.path.basename(row.file)} {row.line - 1}" for row in shuffled(rows, 3))


def test_the_order_hangs_on_seed_and_content_alone():
    rows = stored(numbered(3000))
    drawn = shuffled(rows, 1)
    assert sorted(row.number for row in drawn) == list(range(3000))
    assert shuffled(tuple(reversed(rows)), 1) == drawn == shuffled(rows[::-1], 1) != rows
    assert shuffled(rows, 2) != drawn and shuffled(rows, -1) != shuffled(rows, 2**64 - 2)
    half = rows.take(np.arange(3000) % 2 == 0)
    assert list(shuffled(half, 1)) == [row for row in drawn if row.number % 2 == 0]
    places = np.argsort(drawn.numbers)
    assert abs(np.corrcoef(places, np.arange(3000))[0, 1]) < 0.1


def test_chunks_hold_few_long_rows():
    values = [{"text": "x" * size} for size in [10] * 3000 + [2**20] * 5 + [10] * 10]
    chunks = list(stored(values).chunks(1000))
    assert [row.values for chunk in chunks for row in chunk] == values
    assert (
        max(map(len, chunks)) == 1000 and max(sum(len(r.values["text"]) > 10 for r in chunk) for chunk in chunks) <= 2
    )


# ---- files


def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("INLAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(mapped, "SMALL", 1000)
    return tmp_path / "home"


def test_a_full_disk_names_the_cache(tmp_path, monkeypatch):
    class Full:
        def __init__(self, left):
            self.left = left

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            pass

    home = cached(tmp_path, monkeypatch)
    monkeypatch.setattr(mapped, "unnamed_file", lambda: Full(20_000))
    with pytest.raises(InlayError, match=r"the cache .*home cannot take the rows \(No space left.*INLAY_HOME") as error:
        stored(numbered(5000))
    assert str(home) in str(error.value)
    with pytest.raises(InlayError, match="No space left"):
        prepare(Words(), [Row({"text": "a " * 50}, n, "f", n) for n in range(2000)])


def test_a_cache_that_cannot_be_used_is_named_and_small_data_does_without(tmp_path, monkeypatch):
    home = cached(tmp_path, monkeypatch)
    home.write_text("a file")
    monkeypatch.setattr(mapped, "SMALL", 2**20)
    assert len(prepare(Words(), stored(numbered(100))).examples) == 100
    monkeypatch.setattr(mapped, "SMALL", 1000)
    with pytest.raises(InlayError, match=r"the cache .*home cannot take the rows"):
        stored(numbered(5000))


def test_nothing_is_left_of_a_killed_process(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, numbered(60_000))))
    code = """
        import sys, time
        from inlay.data.table import read_table
        rows = read_table(sys.argv[1]).rows
        maps = open("/proc/self/maps").read()
        print(len(rows), "inlay-home" in maps, flush=True)
        time.sleep(600)
    """
    home = tmp_path / "inlay-home"
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "INLAY_HOME": str(home)})
    assert process.stdout is not None
    try:
        assert process.stdout.readline().split() == [b"60000", b"True"]
        assert home.is_dir() and not list(home.iterdir())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not list(home.iterdir())


# ---- examples


class Words:
    """Stands in for an encoder: a token a word; "drop" drops a row, "|" parts it into pieces."""

    def encode(self, rows):
        made = []
        for row in rows:
            text = row.values["text"]
            if "drop" in text:
                made.append(DroppedRow(row.where, "a bad word"))
                continue
            pieces = [tuple(len(word) for word in piece.split()) for piece in text.split("|")]
            cut = text.startswith("cut")
            samples = [row.number + (n << PIECE) for n in range(len(pieces))]
            learned = [(False, *(True,) * (len(piece) - 1)) for piece in pieces]
            made.append(list(map(Example, pieces, learned, samples, [int(cut)] * len(pieces), [3] * len(pieces))))
        return made


@pytest.mark.parametrize("small", [mapped.SMALL, 100])
def test_examples_come_back_as_they_were_made(small, monkeypatch):
    monkeypatch.setattr(mapped, "SMALL", small)
    rows = shuffled(stored(numbered(5000)), 1)
    prepared = prepare(Words(), rows)
    made = [example for each in Words().encode(list(rows)) for example in each]
    examples = prepared.examples
    assert isinstance(examples, Examples) and list(examples) == made and examples[-1] == made[-1]
    assert isinstance(examples[0].loss_mask[0], bool) and isinstance(examples[0].ids[0], int)
    sizes = [len(example.ids) for example in made]
    assert examples.lengths.tolist() == token_counts(examples).tolist() == token_counts(made).tolist() == sizes
    assert examples.samples.tolist() == rows.numbers.tolist()
    part = examples[100:4000:3]
    assert list(part) == made[100:4000:3] and part.lengths.tolist() == sizes[100:4000:3]
    assert list(part.take([3, 0])) == [made[109], made[100]] and list(examples.take([])) == []
    assert list(examples.take(examples.lengths < 5)) == [example for example in made if len(example.ids) < 5]
    with pytest.raises(IndexError):
        examples[5000]


def test_what_became_of_rows_is_counted_and_told():
    texts = ["cut a b", "drop", "a b|c d|e f", "drop me", "a|b"]
    heard = []
    rows = [Row({"text": text}, n, "f", n) for n, text in enumerate(texts * 500)]
    prepared = prepare(Words(), rows, lambda done, total: heard.append((done, total)))
    assert prepared.counts == {"rows": 2500, "cut": 500, "in pieces": 1000, "dropped: a bad word": 1000}
    assert np.unique(prepared.examples.numbers).tolist() == [n for n in range(2500) if n % 5 not in (1, 3)]
    assert len(prepared.examples) == 3000 and heard[-1] == (2500, 2500) and len(heard) > 1 and heard == sorted(heard)
    with pytest.raises(DataError, match=r"none of the 2 rows can be learned from \(2 dropped: a bad word\)"):
        prepare(Words(), [rows[1], rows[3]])
    assert "cut" in prepare(Words(), rows[:1]).counts


def test_threads_are_for_the_pass_alone(monkeypatch):
    class Looking(Words):
        def encode(self, rows):
            self.seen = os.environ.get("TOKENIZERS_PARALLELISM")
            return super().encode(rows)

    rows, long = stored(numbered(200)), stored([{"text": "a film " * 20_000}])
    for before in ("false", "true", None):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        for given, seen in ((rows, "true"), (rows[:9], before), (long, "true")):
            encoder = Looking()
            prepare(encoder, given)
            assert encoder.seen == seen and os.environ.get("TOKENIZERS_PARALLELISM") == before
    with pytest.raises(DataError):
        prepare(Words(), [Row({"text": "drop"}, n, "f", n) for n in range(100)])
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_fork_after_the_pass_neither_hangs_nor_warns(base_folder):
    code = """
        import os, sys
        from transformers import AutoTokenizer
        from inlay.data.encode import Encoder
        from inlay.data.prepare import prepare
        from inlay.data.rows import Row
        from inlay.data.template import Template

        rows = [Row({"text": f"a good film, number {n}"}, n, "f", n) for n in range(3000)]
        encoder = Encoder(AutoTokenizer.from_pretrained(sys.argv[1]), Template("text", answer="text"), 64)
        threads = len(os.listdir("/proc/self/task"))
        prepare(encoder, rows)
        more = len(os.listdir("/proc/self/task")) - threads
        child = os.fork()
        if not child:
            os._exit(7 if len(encoder.encode(rows)) == 3000 else 1)
        print(os.waitpid(child, 0)[1] >> 8, more > 0 or os.cpu_count() == 1)
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(base_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.split() == ["7", "True"] and not done.stderr


def test_the_collector_is_left_as_it_was():
    class Cyclic(Words):
        def encode(self, rows):
            assert not gc.isenabled()
            ring: list = [Lost()]
            ring.append(ring)
            return super().encode(rows)

    class Lost:
        def __del__(self):
            lost.append(len(lost))

    lost, seen = list[int](), list[int]()
    rows = stored(numbered(20_000))
    prepare(Cyclic(), rows, lambda done, total: seen.append(len(lost)))
    assert gc.isenabled() and max(seen) >= 15  # cycles do not wait for the end
    gc.disable()
    try:
        prepare(Words(), rows[:10])
        assert not gc.isenabled()
    finally:
        gc.enable()


KINDS = {
    "label": Template("label", "Review: {text}\nSentiment:", "label", {"0": ["negative"], "1": ["positive"]}),
    "completion": Template("completion", "{text}", "answer"),
    "text": Template("text", answer="text"),
    "chat": Template("completion", "{text}", "answer", chat=True),
    "messages": Template("messages", answer="messages", chat=True),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_pass_makes_what_one_row_at_a_time_makes(kind, tokenizer):
    values = [
        each | {"answer": " an answer " * (n % 5 + 1), "messages": [
            {"role": "user", "content": each["text"]}, {"role": "assistant", "content": "answer " * (n % 9 + 1)}
        ]}
        for n, each in enumerate(numbered(300))
    ]  # fmt: skip
    rows = stored(values)
    encoder = Encoder(tokenizer, KINDS[kind], 256)
    prepared = prepare(encoder, rows)
    assert list(prepared.examples) == [encoder.example(row) for row in rows]
    assert prepared.counts == {"rows": 300, "cut": 0}


def test_many_rows_take_little_memory(tmp_path):
    code = """
        import sys
        from inlay.data.encode import Example
        from inlay.data.prepare import prepare
        from inlay.data.rows import duplicates, shuffled
        from inlay.data.table import read_table

        class Long:
            def encode(self, rows):
                return [[Example(tuple(range(1000, 1040)), (False,) * 38 + (True,) * 2, row.number)] for row in rows]

        def private():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) // 1024

        rows = read_table(sys.argv[1]).rows[:10]
        prepare(Long(), rows)
        before = private()
        rows = shuffled(read_table(sys.argv[1]).rows, 1)
        held, kept = rows[:500], rows[500:]
        doubles = duplicates(rows)
        examples = prepare(Long(), kept).examples
        print(len(rows), doubles, len(examples), int(examples.lengths.sum()), private() - before)
    """
    with open(tmp_path / "a.csv", "w") as file:
        file.write("text,label\n")
        file.writelines(
            f'"film {n}: a story of some thirty words, {"as they are " * 8}",{n % 2}\n' for n in range(100_000)
        )
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.csv")]
    environment = {**os.environ, "INLAY_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    count, doubles, made, tokens, private = map(int, done.stdout.split())
    assert (count, doubles, made, tokens) == (100_000, 0, 99_500, 99_500 * 40)
    assert private < 48, f"{private} MB"  # as Python objects they take 150
