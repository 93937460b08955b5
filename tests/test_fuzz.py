"""Whatever is typed or lies in a file, people read one line: 2,000 inputs and more, in one process, one tiny base."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import inlay
from inlay.cli.app import app
from inlay.data.choose import Columns, choose_template
from inlay.data.encode import Encoder
from inlay.data.prepare import prepare
from inlay.data.table import read_table
from inlay.errors import InlayError
from inlay.methods.table import METHODS
from inlay.runs.settings import Settings, make_method
from inlay.values import fields_of
from zoo import ALONE, FITTING

settings.register_profile(
    "ci", deadline=None, derandomize=not os.environ.get("INLAY_FUZZ"), database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("ci")

words = st.text(st.characters(codec="utf8", exclude_characters="\0"), max_size=12)
numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([10**40, -(2**63), 2**64, 1e308]))
plain = st.one_of(
    st.none(), st.booleans(), numbers, words, st.sampled_from(["1e-4", "auto", "none", "true", "[(", "{text"])
)
values = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3))
)


def said_by(work) -> str:
    """What `work` refuses in one line; "" where it does not. Any other error is a failure of the test."""
    try:
        work()
    except InlayError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
        return str(error)
    return ""


@given(st.sampled_from([f.name for f in fields_of(Settings)]), values)
@settings(max_examples=400)
def test_settings(name, value):
    said = said_by(lambda: Settings(**{"data": "a.csv", "out": "run", name: value}))
    if isinstance(value, float) and not math.isfinite(value):
        assert said or name in ("set",)


METHOD_FIELDS = [(name, field.name) for name, kind in METHODS.items() for field in fields_of(kind)]


@given(st.sampled_from(METHOD_FIELDS), values)
@settings(max_examples=500)
def test_settings_of_methods(which, value):
    said_by(lambda: make_method(which[0], {which[1]: value}))


@pytest.fixture(scope="module")
def bank(base_folder):
    return inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))


@given(st.sampled_from(METHOD_FIELDS), values)
@settings(max_examples=150)
def test_methods_on_a_base(bank, which, value):
    made = []
    if said_by(lambda: made.append(make_method(which[0], {which[1]: value}))):
        return
    if not said_by(lambda: bank.add("fuzz", made[0])):
        bank.remove("fuzz")


flags = st.lists(
    st.tuples(st.sampled_from([f.flag for f in fields_of(Settings) if f.type is not bool]), words),
    min_size=1,
    max_size=3,
)


def call(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (0, 1, 2) and "More is in" not in result.stderr, (arguments, result.stderr)
    assert "Traceback" not in result.stderr + result.stdout


@given(flags)
@settings(max_examples=150)
def test_flags(tmp_path_factory, given_flags):
    out = tmp_path_factory.mktemp("out") / "run"
    pairs = {"--base": "no-such-base", "--data": "no-such.csv", "--out": str(out)} | dict(given_flags)
    pairs["--out"], pairs["--base"] = str(out), "no-such-base"
    call("train", *[f"{flag}={value}" for flag, value in pairs.items()])
    assert not out.exists()


configs = st.one_of(
    st.dictionaries(st.one_of(words, st.sampled_from([f.name for f in fields_of(Settings)])), values, max_size=4).map(
        lambda value: json.dumps(value, default=str).encode("utf8", "surrogatepass")
    ),
    st.binary(max_size=60),
    words.map(str.encode),
)


@given(configs)
@settings(max_examples=200)
def test_config_files(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("config")
    config = folder / "run.yaml"
    config.write_bytes(content)
    call("train", "--config", str(config), "--base=no-such-base", "--data=no-such.csv", f"--out={folder / 'run'}")
    assert not (folder / "run").exists()


@pytest.fixture(scope="module")
def saved(bank, tmp_path_factory):
    folders = {}
    for name in ALONE:
        folders[name] = tmp_path_factory.mktemp("saved") / name
        bank.add(name, METHODS[name](**FITTING.get(name, {})))
        bank.save(name, folders[name], notes={"max_length": 64, "template": {"kind": "text", "answer": "text"}})
        bank.remove(name)
    return folders


@given(
    st.sampled_from(ALONE), st.sampled_from(["adapter_config.json", "inlay.json"]), st.integers(0, 30), values,
    st.booleans(),
)  # fmt: skip
@settings(max_examples=300)
def test_adapter_folders(bank, saved, tmp_path_factory, method, file, which, value, drop):
    folder = tmp_path_factory.mktemp("adapter")
    for part in saved[method].iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    held = json.loads((folder / file).read_text())
    key = list(held)[which % len(held)]
    held = {k: v for k, v in held.items() if not (drop and k == key)} if drop else held | {key: value}
    (folder / file).write_text(json.dumps(held), errors="surrogatepass")
    if not said_by(lambda: bank.load("fuzz", folder)):
        bank.remove("fuzz")
    from inlay.data.prompting import prompting_of

    said_by(lambda: prompting_of([folder]))


@given(st.sampled_from(ALONE), st.binary(max_size=200), st.integers(0, 10**6))
@settings(max_examples=100)
def test_damaged_weights(bank, saved, tmp_path_factory, method, noise, at):
    folder = tmp_path_factory.mktemp("weights")
    for part in saved[method].iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    file = folder / "adapter_model.safetensors"
    if at % 3 == 0:
        tensors = load_file(file)
        key = list(tensors)[at % len(tensors)]
        save_file({k: v[:-1] if k == key else v for k, v in tensors.items()}, file)
    else:
        raw = bytearray(file.read_bytes())
        raw[at % len(raw) : at % len(raw) + len(noise)] = noise
        file.write_bytes(bytes(raw))
    if not said_by(lambda: bank.load("fuzz", folder)):
        bank.remove("fuzz")


names = st.sampled_from(["text", "label", "prompt", "completion", "messages", "tools", "a.b", "x[y]", "t:en"])
message = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "weight", "name"]),
    st.one_of(values, st.sampled_from(["user", "assistant", "system", "tool"])),
    max_size=4,
)
cells = st.one_of(values, words, st.lists(message, max_size=3), st.just("\ud800"), st.just("<|im_end|>"))
rows = st.lists(st.dictionaries(names, cells, max_size=4), min_size=1, max_size=5)
templates = st.one_of(
    st.none(),
    words,
    st.sampled_from(["chat", "{text}", "{text}{answer}", "{a.b}", "{x[y]} {t:en}", "{{{text}}}", "{text!r}"]),
)


def reads(path: Path, tokenizer, template) -> None:
    table = read_table(path)
    chosen = choose_template(table, Columns(), template)
    prepare(Encoder(tokenizer, chosen, 48), table.rows)


@given(rows, templates)
@settings(max_examples=400)
def test_rows_of_jsonl(tmp_path_factory, tokenizer, listed, template):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, listed)))
    said_by(lambda: reads(path, tokenizer, template))


@given(
    st.lists(st.lists(st.one_of(words, st.sampled_from(["0", "1", "", "1.0"])), min_size=2, max_size=2), max_size=5),
    templates,
)
@settings(max_examples=150)
def test_rows_of_csv(tmp_path_factory, tokenizer, listed, template):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with open(path, "w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([["text", "label"], *listed])
    said_by(lambda: reads(path, tokenizer, template))


@given(
    st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".csv.gz", ".jsonl.gz"]),
    st.binary(max_size=120),
)
@settings(max_examples=200)
def test_files_of_random_bytes(tmp_path_factory, tokenizer, kind, content):
    path = tmp_path_factory.mktemp("bytes") / f"rows{kind}"
    path.write_bytes(content)
    said_by(lambda: reads(path, tokenizer, None))
