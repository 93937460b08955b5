"""Adapters of several parts: on disk, merged, and refused where they cannot be what they say."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import FormatError, UsageError
from inlay.methods.table import METHODS
from test_cli import WORDS, answer, reviews
from zoo import make

__all__ = ["reviews"]

MADE = {
    "mam": lambda: inlay.MAM(num_virtual_tokens=3, encoder_hidden_size=6),
    "reft and lora": lambda: [inlay.LoReFT(r=2, suffix_positions=1), inlay.LoRA(r=4)],
    "two loras": lambda: [inlay.LoRA(r=2, targets=["q_proj"]), inlay.LoRA(r=4, alpha=3, targets=["v_proj"])],
    "all": lambda: [
        inlay.LoRA(r=2), inlay.IA3(), inlay.Houlsby(reduction_factor=4), inlay.NormTuning(), inlay.PromptTuning(3),
        inlay.ScaledParallel(reduction_factor=4), inlay.NoReFT(layers=[1]),
    ],
}  # fmt: skip
ALONE = ["loreft", "noreft", "direft", "parallel", "scaled_parallel"]


def scrambled(bank):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def said(bank, name):
    with bank.route([name]):
        return bank.model(input_ids=torch.arange(3, 10)[None]).logits.detach()


def saved(method, folder, base="llama"):
    bank = inlay.attach(make(base))
    bank.add("a", method, seed=1)
    scrambled(bank)
    bank.save("a", folder)
    return bank


def reopened(folder, base="llama"):
    bank = inlay.attach(make(base))
    return bank, bank.load("b", folder)


@pytest.mark.parametrize("kind", list(MADE))
def test_parts_open_again_as_they_were(kind, tmp_path):
    bank = saved(MADE[kind](), tmp_path)
    other, adapter = reopened(tmp_path)
    assert [type(m) for m in adapter.methods] == [type(m) for m in bank.adapters["a"].methods]
    torch.testing.assert_close(said(other, "b"), said(bank, "a"), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PARTS" and len(config["parts"]) == len(adapter.parts)
    other.save("b", tmp_path / "again")
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")[key], value)


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("name", ALONE)
def test_methods_of_their_own_layout_open_again(name, base, tmp_path):
    bank = saved(METHODS[name](layers=[1]), tmp_path, base)
    _, adapter = reopened(tmp_path, base)
    assert adapter.method == bank.adapters["a"].method
    for path, own in bank.adapters["a"].params.items():
        for key, value in own.items():
            assert torch.equal(adapter.params[path][key], value)
            assert adapter.params[path][key].requires_grad == value.requires_grad


def test_parts_that_peft_can_say_are_said_in_its_words(tmp_path):
    own = {"targets": ["query", "value"]}
    parts = [inlay.LoRA(r=2, **own), inlay.BitFit(**own), METHODS["head"]()]
    bank = saved(parts, tmp_path, "roberta_classifier")
    ids = torch.arange(3, 10)[None]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "all", ["classifier"])
    other, adapter = reopened(tmp_path, "roberta_classifier")
    assert {type(m).__name__ for m in adapter.methods} == {"LoRA", "BitFit", "ModulesToSave"}
    torch.testing.assert_close(said(other, "b"), said(bank, "a"), rtol=0, atol=1e-9)
    theirs = peft.PeftModel.from_pretrained(make("roberta_classifier"), str(tmp_path)).double().eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, said(bank, "a"), rtol=0, atol=1e-6)


def test_parts_that_undo_one_another_are_refused(tmp_path):
    bank = inlay.attach(make("roberta_classifier"))
    for inner in (inlay.BitFit(targets=["classifier.dense"]), inlay.LoRA(targets=["out_proj"])):
        with pytest.raises(UsageError, match=f"replaces classifier, where {inner.title} acts"):
            bank.add("a", [inner, METHODS["head"]()])
    with pytest.raises(UsageError, match=r"replaces classifier\.dense, where LoRA acts"):
        bank.add("a", [inlay.LoRA(targets=["dense"]), METHODS["head"](targets=["classifier.dense"])])
    with pytest.raises(UsageError, match="are both LoRA at"):
        bank.add("a", [inlay.LoRA(targets=["query"]), inlay.LoRA(r=2)])
    assert not bank.adapters


# ---- broken folders


@pytest.fixture
def folder(tmp_path):
    saved(MADE["reft and lora"](), tmp_path / "whole")

    def broken(change=None, config=None):
        copy = tmp_path / "broken"
        shutil.copytree(tmp_path / "whole", copy, dirs_exist_ok=True)
        tensors = load_file(copy / "adapter_model.safetensors")
        if change is not None:
            change(tensors)
            save_file(tensors, copy / "adapter_model.safetensors")
        if config is not None:
            path = copy / "adapter_config.json"
            path.write_text(json.dumps(config(json.loads(path.read_text()))))
        return copy

    return broken


A = "1.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
W = "0.base_model.model.model.layers.1.reft_layer.units.0.learned_source.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(A), "lora_A"),
        (lambda t: t.pop(W), r"part 0 of .*units\.0\.learned_source\.weight"),
        (lambda t: t.update({W: torch.zeros(2, 3)}), r"learned_source.*shape \(2, 3\)"),
        (lambda t: t.update({"0.more": torch.zeros(1)}), "part 0 .*of no use, first 'more'"),
        (lambda t: t.update({"2.more": torch.zeros(1)}), "'2.more', which is of no part"),
        (lambda t: t.update({"more": torch.zeros(1)}), "'more', which is of no part"),
        (lambda t: t.update({"00.more": torch.zeros(1)}), "'00.more', which is of no part"),
        (lambda t: t.update({W: t[W] * float("nan")}), "NaN"),
    ],
)
def test_tensors_that_are_missing_extra_or_misshapen_are_named(folder, change, named):
    with pytest.raises(FormatError, match=named):
        reopened(folder(change))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda c: {**c, "parts": []}, "no list of configs"),
        (lambda c: {**c, "parts": "LORA"}, "no list of configs"),
        (lambda c: {**c, "parts": [*c["parts"], 3]}, "no list of configs"),
        (lambda c: {**c, "parts": [c, *c["parts"][1:]]}, "parts that have parts"),
        (lambda c: {**c, "parts": [{**c["parts"][0], "peft_type": "WHAT"}, c["parts"][1]]}, "part 0 .*'WHAT'"),
        (lambda c: {**c, "parts": [{**c["parts"][0], "r": -1}, c["parts"][1]]}, "part 0 .* r is -1"),
        (lambda c: {**c, "parts": [{"peft_type": "LOREFT"}, c["parts"][1]]}, "part 0 .* lacks the field 'r'"),
        (lambda c: {**c, "parts": [c["parts"][0], {**c["parts"][1], "bias": "some"}]}, "part 1 .*bias"),
        (lambda c: {**c, "parts": c["parts"][:1]}, "which is of no part"),
    ],
)
def test_configs_that_cannot_be_are_refused(folder, config, named):
    with pytest.raises(FormatError, match=named):
        reopened(folder(config=config))


# ---- merged


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [inlay.LoRA(r=2), inlay.IA3()],
        lambda: [inlay.IA3(), inlay.LoRA(r=2)],
        lambda: [inlay.LoRA(r=2, targets=["q_proj"]), inlay.LoRA(r=4, targets=["v_proj"]), inlay.NormTuning()],
    ],
)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_merged_parts_do_what_they_did(parts, base):
    if base == "gpt2" and not isinstance(parts()[1], inlay.IA3):
        parts = lambda: [inlay.IA3(), inlay.LoRA(r=2), inlay.NormTuning()]  # noqa: E731
    bank = inlay.attach(make(base))
    bank.add("a", parts(), seed=1)
    scrambled(bank)
    ids = torch.arange(3, 10)[None]
    expected, plain = said(bank, "a"), said(bank, None)
    assert not torch.allclose(expected, plain, atol=1e-3)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=ids).logits, expected, rtol=0, atol=1e-9)


def test_a_part_that_cannot_be_merged_is_named_and_nothing_is_written():
    bank = inlay.attach(make("llama"))
    bank.add("a", [inlay.LoRA(r=2), inlay.Parallel()], seed=1)
    scrambled(bank)
    plain, expected = said(bank, None), said(bank, "a")
    with pytest.raises(UsageError, match="Parallel adapter cannot be merged"):
        bank.merge("a")
    assert torch.equal(said(bank, None), plain) and torch.equal(said(bank, "a"), expected)


# ---- runs


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mam", ["num_virtual_tokens=4", "encoder_hidden_size=8", "reduction_factor=4", "dropout=0.1"]),
        ("loreft", ["r=2", "suffix_positions=1"]),
        ("scaled_parallel", []),
    ],
)
def test_a_run_trains_evaluates_and_resumes(method, settings, base_folder, reviews, tmp_path):
    def train(out, *more):
        sets = [word for setting in settings for word in ("--set", setting)]
        return answer(
            "train", "--base", base_folder, "--data", reviews, "--out", out, *WORDS, "--method", method, *sets,
            "--heldout", "0.2", "--dtype", "float32", "--batch-size", 8, "--lr", 3e-3, "--checkpoint-every", 1,
            "--schedule", "constant", *more,
        )  # fmt: skip

    whole = train(tmp_path / "whole", "--steps", 4)
    train(tmp_path / "resumed", "--steps", 2)
    train(tmp_path / "resumed", "--steps", 4, "--resume")
    last = load_file(tmp_path / "whole" / "last" / "adapter_model.safetensors")
    for key, value in load_file(tmp_path / "resumed" / "last" / "adapter_model.safetensors").items():
        torch.testing.assert_close(last[key], value, rtol=0, atol=1e-6)
    scores = answer("eval", "--base", base_folder, "--data", reviews, "--adapter", tmp_path / "whole")
    assert scores["rows"] == 60
    more = answer(
        "train", "--base", base_folder, "--data", reviews, "--out", tmp_path / "more", *WORDS, "--heldout", "0.2",
        "--from", tmp_path / "whole", "--steps", 2, "--dtype", "float32", "--batch-size", 8,
    )  # fmt: skip
    same = more["trainable_parameters"] == whole["trainable_parameters"]
    assert same or method == "mam"  # whose prefixes are no longer made by a network
