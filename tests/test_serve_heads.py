"""What `inlay train` makes of labelled rows, served: labels as words, and heads that the base lacks."""

from __future__ import annotations

import csv
import json
import shutil

import httpx
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import inlay
from inlay.bases.beside import with_head
from inlay.bases.heads import Head
from inlay.bases.load import load_base
from inlay.cli.app import app
from inlay.errors import UsageError
from inlay.methods.head import ModulesToSave
from inlay.serve.adapters import AdapterStore
from inlay.serve.heads import check_brings
from serving import serving
from test_tasks import encoder_folder  # noqa: F401
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["a good film", "a bad film"]
RUNS = {
    "words": [], "verbalizer": ["--verbalizer", "1=positive,0=negative"], "head": ["--task", "classify"],
    "headonly": ["--task", "classify", "--method", "head"], "number": ["--task", "regress"],
    "tags": ["--task", "tag"],
}  # fmt: skip
HEADS = {"head": "classify", "headonly": "classify", "number": "regress", "tags": "tag"}


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def runs(base_folder, tmp_path_factory):
    """Each way to train on labels, as a run's folder."""
    folder = tmp_path_factory.mktemp("heads")
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = [(f"a {'good' if n % 2 else 'bad'} film {n}", n % 2) for n in range(20)]
        csv.writer(file).writerows([("text", "label"), *rows])
    tagged = [{"tokens": ["a", "good", "film"], "tags": ["O", "B", "O"]} for _ in range(20)]
    (folder / "tags.jsonl").write_text("".join(json.dumps(row | {"id": n}) + "\n" for n, row in enumerate(tagged)))
    for name, more in RUNS.items():
        data = folder / ("tags.jsonl" if name == "tags" else "rows.csv")
        given = ["--data", data, "--base", base_folder, "--dtype", "float32", "--steps", 2]
        command("train", *given, "--out", folder / "runs" / name, *more)
    foreign = folder / "runs" / "foreign"
    shutil.copytree(folder / "runs" / "head" / "adapter", foreign)
    (foreign / "inlay.json").unlink()
    return folder / "runs"


@pytest.fixture(scope="module")
def running(base_folder, runs):
    with serving(base_folder, runs) as made:
        yield made


def asked(running, name, path="classify", **body):
    return httpx.post(f"{running.url}/v1/{path}", json={"model": name, **body}, timeout=30)


def predicted(runs, name, base_folder, tmp_path):
    """What `inlay predict` says of the texts."""
    (tmp_path / "new.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    given = ["--data", tmp_path / "new.csv", "--base", base_folder, "--dtype", "float32"]
    command("predict", "--adapter", runs / name, *given, "--out", tmp_path / "said.jsonl")
    return [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["words", "verbalizer", "head", "headonly"])
def test_labels_have_the_probabilities_of_predict(running, runs, base_folder, tmp_path, name):
    found = asked(running, name, input=TEXTS)
    assert found.status_code == 200, found.text
    for one, row in zip(found.json()["data"], predicted(runs, name, base_folder, tmp_path), strict=True):
        own = one["probabilities"]
        assert set(own) == {"0", "1"} and sum(own.values()) == pytest.approx(1)
        assert one["label"] == max(own, key=lambda label: own[label]) == row["prediction"]
        assert list(own.values()) == pytest.approx([row[f"probability of {label}"] for label in own], abs=1e-4)


def test_a_head_that_gives_numbers_gives_those_of_predict(running, runs, base_folder, tmp_path):
    found = asked(running, "number", input=TEXTS).json()["data"]
    said = predicted(runs, "number", base_folder, tmp_path)
    assert [one["value"] for one in found] == pytest.approx([float(row["prediction"]) for row in said], abs=1e-4)


def test_a_head_that_tags_gives_a_tag_for_each_word(running):
    found = asked(running, "tags", input=TEXTS).json()["data"]
    assert [len(one["tags"]) for one in found] == [3, 3] and {tag for one in found for tag in one["tags"]} <= {"O", "B"}


@pytest.mark.parametrize("name", list(HEADS))
def test_an_adapter_with_a_head_writes_no_text(running, name):
    chat, text = {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"}
    for path, body in (("chat/completions", chat), ("completions", text), ("completions", {**text, "echo": True})):
        made = asked(running, name, path, **body)
        assert made.status_code == 400 and "writes no text" in made.json()["error"]["message"]
    assert asked(running, "words", "completions", prompt="a", max_tokens=2).status_code == 200


def test_a_base_with_a_head_holds_no_weights_twice(runs, base_folder):
    base = load_base(str(base_folder), "float32")
    classify, tag = Head("classify", ("a", "b", "c")), Head("tag", ("a", "b"))
    for head, fresh in ((classify, ["score.weight"]), (tag, ["score.weight", "score.bias"])):
        made, empty = with_head(base.model, base.tokenizer, head)
        assert empty == ["score"]
        own = {p.data_ptr() for p in base.model.parameters()}
        assert [name for name, p in made.named_parameters() if p.data_ptr() not in own] == fresh
        assert made.score.weight.shape[0] == len(head.labels) and made.config.num_labels == len(head.labels)
    assert not hasattr(base.model, "score") and base.model.config.num_labels == 2


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_moe", "jamba", "bert", "roberta"])
def test_a_base_with_a_head_gives_the_same_states(name):
    model = make(name)
    made, _ = with_head(model, None, Head("classify", ("a", "b", "c")))
    ids = torch.arange(6, 14)[None]
    with torch.no_grad():
        states = [one.base_model(input_ids=ids)[0] for one in (model, made)]
        assert torch.equal(*states) and made(input_ids=ids).logits.shape == (1, 3)


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_that_the_base_cannot_take_is_named(runs, base_folder, name):
    base = load_base(str(base_folder), "float32")
    store = AdapterStore(inlay.attach(base.model), [runs])
    for _ in range(2):  # what did not load is refused by the same words again
        with pytest.raises(UsageError, match=f"'{name}' was trained to {HEADS[name]} with a head") as refused:
            store.opened(name)
        assert "LlamaForCausalLM, has none. Ask it with `inlay predict`" in str(refused.value)
        assert ("words for its labels" in str(refused.value)) is (HEADS[name] == "classify")
    info = store.info(name)
    assert "has none" in info.error and not info.loaded


def test_quantized_bases_take_no_head(base_folder):
    base = load_base(str(base_folder), "float32")
    base.model.hf_quantizer = object()
    with pytest.raises(UsageError, match="is quantized"):
        with_head(base.model, base.tokenizer, Head("classify", ("a", "b")))


@pytest.fixture(scope="module")
def encoding(encoder_folder, runs, tmp_path_factory):  # noqa: F811
    """A server over a base that writes no text."""
    folder = tmp_path_factory.mktemp("encoding")
    for name in ("head", "number"):
        given = ["--data", runs.parent / "rows.csv", "--base", encoder_folder, "--dtype", "float32", "--steps", 2]
        command("train", *given, "--out", folder / name, *RUNS[name])
    with serving(encoder_folder, folder) as made:
        yield made, folder


def test_a_base_that_writes_no_text_serves_heads(encoding, encoder_folder, tmp_path):  # noqa: F811
    made, folder = encoding
    found = asked(made, "head", input=TEXTS).json()["data"]
    for one, row in zip(found, predicted(folder, "head", encoder_folder, tmp_path), strict=True):
        own = one["probabilities"]
        assert list(own.values()) == pytest.approx([row[f"probability of {label}"] for label in own], abs=1e-4)
    assert all(isinstance(one["value"], float) for one in asked(made, "number", input=TEXTS).json()["data"])
    assert httpx.get(f"{made.url}/v1/adapters", timeout=30).json()["writes"] is False
    base = made.service.base
    for path, body in (("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                       ("completions", {"prompt": "a", "echo": True})):  # fmt: skip
        refused = asked(made, base, path, **body)
        assert refused.status_code == 400 and "writes no text" in refused.json()["error"]["message"]


def test_a_pooler_that_the_files_hold_is_read(encoder_folder, runs, tmp_path):  # noqa: F811
    """As many bases on the hub have one that their class leaves out."""
    shutil.copytree(encoder_folder, tmp_path / "base")
    torch.manual_seed(0)
    model = tf.BertForPreTraining(tf.BertConfig.from_pretrained(encoder_folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    given = ["--data", runs.parent / "rows.csv", "--base", tmp_path / "base", "--dtype", "float32", "--steps", 8]
    command("train", *given, "--lr", 0.01, "--out", tmp_path / "runs" / "head", *RUNS["head"])
    with serving(tmp_path / "base", tmp_path / "runs") as made:
        found = asked(made, "head", input=TEXTS).json()["data"]
    for one, row in zip(found, predicted(tmp_path / "runs", "head", tmp_path / "base", tmp_path), strict=True):
        own = one["probabilities"]
        assert list(own.values()) == pytest.approx([row[f"probability of {label}"] for label in own], abs=1e-4)


def test_a_pooler_that_nobody_has_is_no_guess(encoder_folder, runs, tmp_path):  # noqa: F811
    base = load_base(str(encoder_folder), "float32")
    made, empty = with_head(base.model, base.tokenizer, Head("classify", ("0", "1")), base.folder)
    assert empty == ["bert.pooler.dense", "classifier"]
    bank = inlay.attach(made)
    bank.add("bare", [inlay.LoRA(r=2), ModulesToSave(["classifier"])])
    bank.add("whole", [inlay.LoRA(r=2), ModulesToSave(["classifier", "pooler.dense"])])
    check_brings(bank, "whole", empty)
    with pytest.raises(UsageError, match=r"'bare' has no bert\.pooler\.dense of its own"):
        check_brings(bank, "bare", empty)


def test_what_is_loaded_answers_as_what_it_is(base_folder, runs, tmp_path):
    """Whatever the folder holds meanwhile: labels in another order, another task, files that do not load."""
    for name in ("head", "verbalizer"):
        shutil.copytree(runs / name / "adapter", tmp_path / name)
    with serving(base_folder, tmp_path) as made:
        first = {name: asked(made, name, input=TEXTS).json()["data"] for name in ("head", "verbalizer")}
        for name, task in (("head", "generate"), ("verbalizer", "classify")):
            notes = json.loads((tmp_path / name / "inlay.json").read_text())
            notes["template"]["verbalizer"] = dict(reversed(notes["template"]["verbalizer"].items()))
            notes["template"]["task"] = task
            next((tmp_path / name).glob("*.safetensors")).write_bytes(b"cut off")
            (tmp_path / name / "inlay.json").write_text(json.dumps(notes))
            assert asked(made, name, input=TEXTS).json()["data"] == first[name]
        assert asked(made, "verbalizer", "completions", prompt="a", max_tokens=2).status_code == 200
        refused = asked(made, "head", "completions", prompt="a", max_tokens=2)
        assert refused.status_code == 400 and "writes no text" in refused.text


def test_an_adapter_without_a_head_is_refused_where_the_base_writes_no_text(encoding, encoder_folder):  # noqa: F811
    made, folder = encoding
    bank = inlay.attach(load_base(str(encoder_folder), "float32").model)
    bank.add("lora", inlay.LoRA(r=2))
    bank.save("lora", folder / "lora")
    loaded = httpx.post(f"{made.url}/v1/load_lora_adapter", json={"lora_name": "lora", "lora_path": "lora"}, timeout=30)
    assert loaded.status_code == 400 and "notes no head" in loaded.text and "writes no text" in loaded.text


def test_the_reason_why_no_head_is_made_is_told(runs, base_folder):
    base = load_base(str(base_folder), "float32")
    base.model.hf_quantizer = object()
    opens = lambda head: with_head(base.model, base.tokenizer, head)  # noqa: E731
    store = AdapterStore(inlay.attach(base.model), [runs], opens=opens)
    with pytest.raises(UsageError, match="is quantized, and takes no head"):
        store.opened("head")


def test_a_head_of_another_librarys_adapter_is_named_too(running):
    made = asked(running, "foreign", "completions", prompt="a", max_tokens=2)
    assert made.status_code >= 400 and "'foreign' was trained to classify with a head" in made.text
    loaded = httpx.post(
        f"{running.url}/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "foreign"}, timeout=30
    )
    assert loaded.status_code == 400 and "has none" in loaded.text
