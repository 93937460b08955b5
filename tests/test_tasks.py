"""Labels, numbers and tags by a head: losses as transformers', scores as other libraries', and whole runs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

import inlay
from inlay.bases.heads import Head
from inlay.bases.load import load_base
from inlay.cli.app import app
from inlay.data.choose import Columns
from inlay.data.choose_head import head_template
from inlay.data.table import read_table
from inlay.data.targets import HeadEncoder, Targeted, prepare_targets
from inlay.errors import DataError, UsageError
from inlay.evaluation.head_predict import predicted_by_head
from inlay.evaluation.head_rows import NumberScores, TagScores, spans_of
from inlay.evaluation.heads import head_rows
from inlay.methods.head import ModulesToSave
from inlay.runs.run import run
from inlay.runs.settings import Settings
from inlay.runtime.forward import Segment
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import HeadTask
from inlay.training.loop import train
from inlay.training.plan import Plan

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "dull", "poor", "awful"]
FILLER = ["the", "film", "plot", "cast", "and", "was", "Anna", "Paris"]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A tiny random BERT for masked words, with a tokenizer of whole words and pieces."""
    folder = tmp_path_factory.mktemp("encoder")
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=special)
    inner.train_from_iterator([" ".join([*GOOD, *BAD, *FILLER])] * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]",
    )  # fmt: skip
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(config)
    with torch.no_grad():  # the usual start is so small that words would hardly matter
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(count, seed=0):
    """Rows of a few words, one of which says the label; its number is how many such words there are."""
    random = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        label = ["negative", "positive", "mixed"][n % 3]
        told = {"negative": [BAD], "positive": [GOOD], "mixed": [GOOD, BAD]}[label]
        words = [*random.choice(FILLER, random.integers(2, 6)), *(random.choice(own) for own in told)]
        random.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "score": sum(w in GOOD for w in words)})
    return rows


def tagged(count, seed=0):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [str(word) for word in random.choice([*FILLER, *GOOD], random.integers(3, 8))]
        rows.append({"tokens": words, "tags": [{"Anna": "B-PER", "Paris": "B-LOC"}.get(word, "O") for word in words]})
    return rows


def file_of(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder, task, path, columns=None, max_length=32):
    """An encoder of the rows in a file, its table, and a bank of the base with their head in float64."""
    table = read_table(path)
    template = head_template(table, task, Columns(**(columns or {})))
    base = load_base(str(folder), "float32", head=Head(task, tuple(template.verbalizer)))
    return HeadEncoder(base.tokenizer, template, max_length), table, inlay.attach(base.model.double())


ROWS = {"classify": reviews(12), "regress": reviews(12), "tag": tagged(12)}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("base", ["encoder_folder", "base_folder"])
def test_losses_are_those_of_transformers(task, base, request, tmp_path):
    encoder, table, bank = opened(
        request.getfixturevalue(base),
        task,
        file_of(tmp_path, ROWS[task]),
        {"label": "score"} if task == "regress" else {},
    )
    bank.add("x", [inlay.LoRA(r=2), ModulesToSave()], seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    examples = list(prepare_targets(encoder, table.rows).examples)
    losses = HeadTask(task).losses(bank, [Segment("x" if n % 2 else None, e) for n, e in enumerate(examples)])
    for n, (example, own) in enumerate(zip(examples, losses, strict=True)):
        assert isinstance(example, Targeted) and len(example.targets) == len(own)
        labels = torch.tensor(example.targets)
        if task == "classify":
            labels = labels.long()
        elif task == "tag":
            labels = torch.full((1, len(example.ids)), -100)
            labels[0, torch.tensor(example.loss_mask)] = torch.tensor(example.targets).long()
        with bank.route(["x" if n % 2 else None]):
            expected = bank.model(input_ids=torch.tensor([example.ids]), labels=labels).loss
        torch.testing.assert_close(own.mean(), expected.double(), rtol=0, atol=1e-6)


def test_the_first_piece_of_a_word_bears_its_tag_and_the_end_of_long_rows_goes(encoder_folder, tmp_path):
    rows = [{"tokens": ["the", "goodfilm", "was", "Paris"], "tags": ["O", "O", "O", "B-LOC"]}]
    encoder, table, _ = opened(encoder_folder, "tag", file_of(tmp_path, rows))
    example = encoder.example(table.rows[0])
    pieces = encoder.tokenizer.convert_ids_to_tokens(list(example.ids))
    marked = [piece for piece, bears in zip(pieces, example.loss_mask, strict=True) if bears]
    assert pieces[0] == "[CLS]" and pieces[-1] == "[SEP]" and len(pieces) > 6
    assert len(marked) == 4 and not any(piece.startswith("##") for piece in marked)
    assert example.targets == (1.0, 1.0, 1.0, 0.0) and encoder.labels == {"B-LOC": 0, "O": 1}
    short, _, _ = opened(encoder_folder, "tag", file_of(tmp_path, rows), max_length=5)
    cut = short.example(table.rows[0])
    assert cut.ids[-1] == example.ids[-1] and cut.ids[:4] == example.ids[:4] and len(cut.targets) < 4 and cut.cut


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("regress", {"text": "a", "label": "many"}, "line 2.*'many', no number"),
        ("regress", {"text": "a", "label": True}, "line 2.*no number"),
        ("tag", {"tokens": ["a"], "tags": ["O", "O"]}, "line 2 has 1 words and 2 tags"),
        ("tag", {"tokens": ["a", " "], "tags": ["O", "O"]}, "line 2.*empty word"),
        ("tag", {"tokens": "a b", "tags": ["O", "O"]}, "line 2.*no list of words"),
    ],
)
def test_answers_that_cannot_be_are_refused_by_row(task, row, said, encoder_folder, tmp_path):
    first = {"text": "b", "label": 1.5} if task == "regress" else {"tokens": ["b"], "tags": ["O"]}
    with pytest.raises(DataError, match=said):
        encoder, table, _ = opened(encoder_folder, task, file_of(tmp_path, [first, row]))
        prepare_targets(encoder, table.rows)


def test_an_encoder_decoder_takes_no_head(tmp_path):
    config = tf.T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no head for the task classify"):
        load_base(str(tmp_path), head=Head("classify", ("a", "b")))


def test_a_base_with_a_head_is_the_same_base_whatever_the_head(encoder_folder):
    two, three = (load_base(str(encoder_folder), head=Head("classify", tuple(labels))) for labels in ("ab", "abc"))
    assert two.fingerprint == three.fingerprint
    assert two.fresh == ("bert.pooler.dense", "classifier")
    again = load_base(str(encoder_folder), head=Head("classify", ("a", "b")))
    assert torch.equal(two.model.classifier.weight, again.model.classifier.weight)


@pytest.mark.parametrize("base", ["encoder_folder", "base_folder"])
def test_a_quantized_base_has_a_whole_head(base, request):
    made = load_base(str(request.getfixturevalue(base)), "float32", "cpu", "4bit", Head("classify", ("a", "b")))
    bank = inlay.attach(made.model)
    bank.add("x", [inlay.LoRA(r=2), ModulesToSave([*made.fresh])])
    with bank.route(["x"]):
        bank.model(input_ids=torch.arange(5, 10)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in bank.adapters["x"].parts[1].params[made.fresh[-1]].values())
    assert any(site.quantized for site in bank.adapters["x"].parts[0].sites.values())


# ---- scores


def test_correlations_are_those_of_pandas():
    random = np.random.default_rng(0)
    true = random.integers(0, 5, 60).astype(float)
    said = true + random.normal(0, 2, 60)
    scores = NumberScores.of_numbers(range(60), true, said).scores()
    assert scores["loss"] == pytest.approx(((true - said) ** 2).mean())
    assert scores["mae"] == pytest.approx(np.abs(true - said).mean())
    assert scores["pearson"] == pytest.approx(pd.DataFrame({"a": true, "b": said}).corr().iloc[0, 1])
    assert scores["spearman"] == pytest.approx(pd.DataFrame({"a": true, "b": said}).corr("spearman").iloc[0, 1])
    assert NumberScores.of_numbers(range(3), [1, 2, 3], [2, 2, 2]).scores()["pearson"] == 0


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O", {(1, 3, "PER")}),
        ("B-PER B-PER I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
        ("I-PER I-PER O I-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("S-PER B-LOC I-LOC E-LOC S-LOC", {(0, 1, "PER"), (1, 4, "LOC"), (4, 5, "LOC")}),
        ("noun noun verb O", {(0, 2, "noun"), (2, 3, "verb")}),
    ],
)
def test_spans_are_read_as_conll_does(tags, spans):
    assert spans_of(tags.split()) == spans


def test_span_f1_counts_whole_spans_over_all_rows():
    true = [["B-PER", "I-PER", "O"], ["B-LOC", "O"], ["O"]]
    said = [["B-PER", "O", "O"], ["B-LOC", "B-PER"], ["O"]]
    scores = TagScores.of_tags([0, 1, 2], [0.5, 0.5, 1.0], true, said).scores()
    assert scores == {"loss": pytest.approx(2 / 6), "accuracy": pytest.approx(4 / 6), "span_f1": pytest.approx(2 / 5)}


@pytest.mark.parametrize("task", ROWS)
def test_scores_and_predictions_agree(task, encoder_folder, tmp_path):
    columns = {"label": "score"} if task == "regress" else {}
    encoder, table, bank = opened(encoder_folder, task, file_of(tmp_path, ROWS[task]), columns)
    bank.add("x", [inlay.LoRA(r=2), ModulesToSave()], seed=1)
    examples = prepare_targets(encoder, table.rows).examples
    labels = tuple(encoder.template.verbalizer)
    small, large = TokenBudget(30), TokenBudget(4096)
    scored = head_rows(bank, task, labels, examples, ["x", None], small)["x"]
    other = head_rows(bank, task, labels, examples, ["x"], large)["x"]
    np.testing.assert_allclose(scored.nats, other.nats)
    said = predicted_by_head(bank, encoder, list(table.rows), "x", large)
    if task == "classify":
        assert scored.predicted is not None
        assert [one.answer for one in said] == [labels[n] for n in scored.predicted]
        assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in said)
    elif task == "regress":
        assert isinstance(scored, NumberScores)
        np.testing.assert_allclose([float(one.answer) for one in said], scored.said)
    else:
        pairs = [(one.tags, row["tags"]) for one, row in zip(said, ROWS[task], strict=True)]
        assert sum(a == b for own, true in pairs for a, b in zip(own, true, strict=True)) == scored.hits.sum()


# ---- whole runs


def settings(folder, task, path, out, **more):
    columns = {"label": "score"} if task == "regress" else {}
    given = {"lr": 0.004, "epochs": 16.0, "dtype": "float32", "heldout": "0.2", "max_length": 32} | more
    return Settings(data=[str(path)], out=str(out), base=str(folder), task=task, columns=columns, **given)


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("base", ["encoder_folder", "base_folder"])
def test_a_run_learns_and_its_folder_alone_tells_the_task(task, base, request, tmp_path):
    make = tagged if task == "tag" else reviews
    folder, path = request.getfixturevalue(base), file_of(tmp_path, make(240))
    result = run(settings(folder, task, path, tmp_path / "run"), on_message=lambda line: None)
    metric, least = {"classify": ("accuracy", 0.55), "regress": ("pearson", 0.4), "tag": ("span_f1", 0.8)}[task]
    assert result["heldout"][metric] > least, result["heldout"]
    assert result["heldout_base"] == {} and result["comparison"] is None
    low, high = result["heldout_intervals"][metric]
    assert low <= result["heldout"][metric] <= high
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["template"]["task"] == task
    assert any("random start" in line for line in record["notices"])
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "adapter" / "README.md").is_file()
    fresh = file_of(tmp_path, make(30, seed=5), "new.jsonl")
    evaluated = command(["eval", "--data", fresh, "--adapter", tmp_path / "run", "--base", folder, "--json"])
    (scores,) = evaluated["adapters"].values()
    assert scores[metric] > 0.8 * least and evaluated["base"] == {}
    said = command(["predict", "--data", fresh, "--adapter", tmp_path / "run", "--base", folder, "--json"])
    for own, row in zip(said["predictions"], make(30, seed=5), strict=True):
        if task == "tag":
            assert len(own["prediction"]) == len(row["tokens"])
        elif task == "regress":
            assert isinstance(own["prediction"], float)
        else:
            shares = [own[f"probability of {label}"] for label in ("mixed", "negative", "positive")]
            assert sum(shares) == pytest.approx(1) and own["probability"] == max(shares)


def test_learners_with_heads_equal_their_solo_runs(encoder_folder, tmp_path):
    """Law 3: two adapters with heads, of other methods and rates, trained together and each alone."""
    plans = [
        Plan("a", inlay.LoRA(r=2, dropout=0.1), lr=0.01, steps=4, batch_size=4, seed=1),
        Plan("b", inlay.PromptTuning(num_virtual_tokens=2), lr=0.1, steps=3, batch_size=6, seed=2, label_smoothing=0.1),
    ]
    weights = []
    for together in (plans, plans[:1], plans[1:]):
        encoder, table, bank = opened(encoder_folder, "classify", file_of(tmp_path, reviews(24)))
        examples = prepare_targets(encoder, table.rows).examples
        learners = train(bank, together, examples, 60, task=HeadTask("classify", ["bert.pooler.dense", "classifier"]))
        weights.append({learner.plan.name: learner.weights() for learner in learners})
    for name, alone in (("a", weights[1]), ("b", weights[2])):
        assert any("classifier" in key for key in alone[name])
        for key, value in alone[name].items():
            torch.testing.assert_close(weights[0][name][key], value, rtol=0, atol=1e-9)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(encoder_folder, tmp_path):
    path, made = file_of(tmp_path, reviews(60)), {}
    for name in ("whole", "broken"):
        own = settings(encoder_folder, "classify", path, tmp_path / name, epochs=2.0, checkpoint_every=1)

        def stop(learner, total, name=name):
            if name == "broken" and learner.step == 3:
                raise KeyboardInterrupt

        try:
            run(own, on_step=stop, on_message=lambda line: None)
        except KeyboardInterrupt:
            run(dataclasses.replace(own, resume=True), on_message=lambda line: None)
        made[name] = load_file(tmp_path / name / "last" / "adapter_model.safetensors")
    assert made["whole"].keys() == made["broken"].keys() and any("classifier" in key for key in made["whole"])
    for key, value in made["whole"].items():
        assert torch.equal(value, made["broken"][key]), key


def test_an_adapter_with_a_head_goes_on_and_is_compared_where_the_base_has_one(encoder_folder, tmp_path):
    path = file_of(tmp_path, reviews(60))
    run(settings(encoder_folder, "classify", path, tmp_path / "first", epochs=1.0), on_message=lambda line: None)
    more = settings(encoder_folder, None, path, tmp_path / "second", epochs=1.0, init_from=str(tmp_path / "first"))
    result = run(more, on_message=lambda line: None)
    assert result["heldout"]["accuracy"] >= 0 and result["heldout_base"] == {}
    with_head = tmp_path / "classifier"
    base = load_base(str(encoder_folder), "float32", head=Head("classify", ("mixed", "negative", "positive")))
    base.model.save_pretrained(with_head)
    base.tokenizer.save_pretrained(with_head)
    compared = run(settings(with_head, "classify", path, tmp_path / "third", epochs=1.0), on_message=lambda line: None)
    assert set(compared["heldout_base"]) == {"loss", "accuracy", "f1"} and compared["comparison"]["metric"] == "loss"


def test_encoders_classify_where_nobody_says_a_task_and_heads_write_no_text(encoder_folder, tmp_path):
    path, said = file_of(tmp_path, reviews(40)), []
    own = dataclasses.replace(settings(encoder_folder, None, path, tmp_path / "run", epochs=1.0))
    result = run(own, on_message=said.append)
    assert any("does not write text" in line for line in said) and "accuracy" in result["heldout"]
    done = CliRunner().invoke(app, ["generate", "--adapter", str(tmp_path / "run"), "--prompt", "a film"])
    assert done.exit_code == 2 and "inlay predict" in done.output
    merged = command(
        ["merge", "--adapter", tmp_path / "run", "--base", encoder_folder, "--out", tmp_path / "m", "--json"]
    )
    assert merged["max_difference"] < 1e-4
    assert tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").config.id2label[1] == "negative"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "text-classification" in card and "AutoModelForSequenceClassification" in card and "generate(" not in card
    theirs = peft.PeftModel.from_pretrained(
        tf.AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3),
        tmp_path / "run" / "adapter",
    ).eval()
    bank = inlay.attach(tf.AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3))
    bank.load("x", tmp_path / "run" / "adapter")  # a head drawn otherwise makes no other base
    bank.set("x")
    ids = torch.tensor([[2, 9, 11, 30, 3]])
    torch.testing.assert_close(bank.model(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_numbers_that_a_head_would_take_long_to_reach_are_said(encoder_folder, tmp_path):
    rows = [{**row, "score": 1000.0 + 100 * row["score"]} for row in reviews(30)]
    said = []
    run(settings(encoder_folder, "regress", file_of(tmp_path, rows), tmp_path / "run", steps=1), on_message=said.append)
    assert any("Scale them" in line for line in said)


def test_several_learners_with_heads_are_one_run(encoder_folder, tmp_path):
    plans = [
        Plan("lora", inlay.LoRA(r=2), lr=0.004, steps=2, batch_size=4),
        Plan("head", ModulesToSave(["classifier"]), lr=0.004, steps=3, batch_size=4),
    ]
    path = file_of(tmp_path, reviews(40))
    result = run(
        settings(encoder_folder, "classify", path, tmp_path / "run"), on_message=lambda line: None, plans=plans
    )
    assert {name: part["steps"] for name, part in result["learners"].items()} == {"lora": 2, "head": 3}
    assert all("accuracy" in part["heldout"] and part["comparison"] is None for part in result["learners"].values())


def test_preview_shows_the_first_pieces_and_what_a_head_should_say(encoder_folder, tmp_path):
    rows = [{"tokens": ["the", "goodfilm", "was", "Paris"], "tags": ["O", "O", "O", "B-LOC"]}]
    shown = command(["preview", "--data", file_of(tmp_path, rows), "--base", encoder_folder, "--task", "tag", "--json"])
    (row,) = shown["shown"]
    assert row["answer"] == "O O O B-LOC" and sum(token["learned"] for token in row["tokens"]) == 4
    words = file_of(tmp_path, reviews(3), "words.jsonl")
    shown = command(["preview", "--data", words, "--base", encoder_folder, "--json", "--max-length", "5"])
    assert shown["shown"][0]["answer"] == "negative" and shown["shown"][0]["cut"] > 0


@pytest.mark.parametrize("task", ROWS)
def test_predictions_go_into_csv_files(task, encoder_folder, tmp_path):
    make = tagged if task == "tag" else reviews
    path = file_of(tmp_path, make(30))
    run(settings(encoder_folder, task, path, tmp_path / "run", steps=1), on_message=lambda line: None)
    out, unlabelled = tmp_path / "said.csv", [dict(row) for row in make(4)]
    for row in unlabelled:
        row.pop({"classify": "label", "regress": "score", "tag": "tags"}[task])
    new = file_of(tmp_path, unlabelled, "new.jsonl")
    command(["predict", "--data", new, "--adapter", tmp_path / "run", "--base", encoder_folder, "--out", out, "--json"])
    said = pd.read_csv(out)
    assert len(said) == 4 and said["prediction"].notna().all() and said["problem"].isna().all()


def command(arguments):
    """What `inlay ...` prints with --json."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not done.exit_code, done.output
    return json.loads(done.stdout)
