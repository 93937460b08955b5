"""`inlay convert`: other libraries' formats, any change of weights as LoRA, and nothing written where it cannot be."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from typer.testing import CliRunner

import inlay
from adapterhub import Saved, base_of
from inlay.cli.app import app
from inlay.errors import UsageError
from inlay.merging.as_lora import as_lora
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
QV = {"targets": "qv"}


def filled(bank, method):
    """An adapter called "a" with random weights."""
    adapter = bank.add("a", method, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return adapter


def logits(bank, name):
    bank.set(name)
    return bank.model(input_ids=IDS).logits.detach()


def added(bank, made):
    """The LoRA that was made, as the adapter "made"."""
    adapter = bank.add("made", made.method, seed=0)
    with torch.no_grad():
        for path, own in adapter.params.items():
            for name, parameter in own.items():
                assert parameter.shape == made.values[path][name].shape
                parameter.copy_(made.values[path][name])
    return "made"


# ---- any change of weights as LoRA

PRODUCTS = {
    "lora": lambda: inlay.LoRA(r=3, alpha=4, rank_pattern={"mlp.*": 2}, alpha_pattern={"mlp.*": 7}),
    "rslora": lambda: inlay.LoRA(r=2, use_rslora=True),
    "vera": lambda: inlay.VeRA(r=3),
    "parts": lambda: [inlay.LoRA(r=2, **QV), inlay.VeRA(r=2)],
}
CHANGES = {
    "dora": lambda: inlay.DoRA(r=2, **QV),
    "ia3": lambda: inlay.IA3(),
    "lokr": lambda: inlay.LoKr(r=2, **QV),
    "oft": lambda: inlay.OFT(oft_block_size=4, **QV),
    "parts": lambda: [inlay.LoRA(r=2, **QV), inlay.IA3()],
}


@pytest.mark.parametrize("kind", list(PRODUCTS))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_product_is_lora_exactly(name, kind):
    bank = inlay.attach(make(name))
    made = as_lora(filled(bank, PRODUCTS[kind]()))
    expected = logits(bank, "a")
    assert set(made.errors.values()) == {0.0}
    torch.testing.assert_close(logits(bank, added(bank, made)), expected, rtol=0, atol=1e-10)


def test_lora_on_a_scaled_table_and_on_experts_is_lora_exactly():
    for name, targets in (("gemma3", ["embed_tokens"]), ("qwen3_moe", "experts")):
        bank = inlay.attach(make(name))
        made = as_lora(filled(bank, inlay.LoRA(r=2, alpha=3, targets=targets)))
        expected = logits(bank, "a")
        torch.testing.assert_close(logits(bank, added(bank, made)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", list(CHANGES))
def test_any_other_change_is_lora_of_full_rank(kind):
    bank = inlay.attach(make("llama"))
    adapter = filled(bank, CHANGES[kind]())
    with pytest.raises(UsageError, match=r"is no low-rank product\. Give --rank"):
        as_lora(adapter)
    made, expected = as_lora(adapter, 24), logits(bank, "a")
    torch.testing.assert_close(logits(bank, added(bank, made)), expected, rtol=0, atol=1e-9)
    assert max(made.errors.values()) < 1e-6


@pytest.mark.parametrize("method", [inlay.LoRA(r=6, alpha=9, **QV), inlay.DoRA(r=2, **QV)])
def test_the_error_is_that_of_the_nearest_product(method):
    bank = inlay.attach(make("llama"))
    adapter = filled(bank, method)
    made = as_lora(adapter, 3)
    for path, site in adapter.sites.items():
        own = adapter.parts[0].at(path, None, {})
        change = method.merge(own, site)["weight"].detach() - site.weight()
        product = made.values[path]["B"] @ made.values[path]["A"]
        assert torch.linalg.matrix_rank(product) == 3
        error = float((change - product).norm() / change.norm())
        assert abs(error - made.errors[path]) < 1e-6
        s = torch.linalg.svdvals(change)
        assert abs(error - float(s[3:].norm() / s.norm())) < 1e-6
    assert made.method.r == 3 and all(0 < error < 1 for error in made.errors.values())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (inlay.Houlsby(reduction_factor=4), "acts on what attention or an MLP gives"),
        (inlay.PrefixTuning(3), "acts on keys and values"),
        (inlay.NormTuning(), "acts on a norm"),
        (inlay.BitFit(), "changes the bias of"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(method, said):
    bank = inlay.attach(make("gpt2"))
    adapter = filled(bank, method)
    with pytest.raises(UsageError, match=said):
        as_lora(adapter, 4)


# ---- the command


@pytest.fixture
def saved(base_folder, tmp_path):
    """A function that saves an adapter of a method beside the tiny base; its folder."""

    def save(method, notes=True):
        bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
        filled(bank, method)
        folder = tmp_path / "source"
        bank.save("a", folder, notes={"base": str(base_folder), "max_length": 99})
        if not notes:
            (folder / "inlay.json").unlink()
            config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return save


def ran(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def told(*arguments):
    done = ran(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(said, *arguments):
    done = ran(*arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output


@pytest.mark.parametrize("to", ["peft", "adapterhub", "loralib", "lora"])
def test_each_format_has_the_same_logits(to, saved, tmp_path):
    out = tmp_path / ("out.pt" if to == "loralib" else "out")
    found = told("--adapter", saved(inlay.LoRA(r=3, alpha=4, **QV)), "--to", to, "--out", out)
    assert found["format"] == to and found["max_difference"] < 1e-5 < found["largest_logit"]
    if to == "loralib":
        assert found["alpha"] == 4
    else:
        assert json.loads((out / "inlay.json").read_text())["max_length"] == 99
    assert ("errors" in found) is (to == "lora")


def test_it_goes_from_library_to_library(saved, base_folder, tmp_path):
    source = saved(inlay.LoRA(r=3, alpha=4, **QV))
    told("--adapter", source, "--to", "adapterhub", "--out", tmp_path / "hub")
    (tmp_path / "hub" / "inlay.json").unlink()
    said = ("--adapter", tmp_path / "hub", "--base", base_folder)
    told(*said, "--to", "loralib", "--out", tmp_path / "lora.safetensors")
    file = ("--adapter", tmp_path / "lora.safetensors", "--base", base_folder)
    refused("does not say its alpha", *file, "--to", "peft", "--out", tmp_path / "back")
    told(*file, "--alpha", "4", "--to", "peft", "--out", tmp_path / "back")
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "back"))
    assert first.keys() == last.keys()
    for key, value in first.items():
        torch.testing.assert_close(last[key], value)
    base = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    assert peft.PeftModel.from_pretrained(base, tmp_path / "back").peft_config["default"].lora_alpha == 4


def test_adapterhubs_folder_becomes_hf_pefts(tmp_path):
    there = Saved("files_llama_linear", "lora")
    base_of("llama").save_pretrained(tmp_path / "base")
    source = there.to(tmp_path / "hub")
    refused("does not say its base. Name the base", "--adapter", source, "--to", "peft", "--out", tmp_path / "out")
    told("--adapter", source, "--to", "peft", "--base", tmp_path / "base", "--out", tmp_path / "out")
    model = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path / "out").eval()
    made = model(input_ids=Saved("files_llama_linear", "lora").ids).logits
    torch.testing.assert_close(made.double(), there.logits, rtol=0, atol=2e-5)


def test_people_are_told_what_a_rank_leaves_out(saved, tmp_path):
    source = saved(inlay.DoRA(r=4, **QV))
    refused("Give --rank", "--adapter", source, "--to", "lora", "--out", tmp_path / "out")
    done = ran("--adapter", source, "--to", "lora", "--rank", 2, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "its rank" in done.output and "% on average" in " ".join(done.output.split())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("to", "method", "said"),
    [
        ("peft", inlay.Pfeiffer(reduction_factor=4), "HF PEFT has no Pfeiffer adapter"),
        ("peft", [inlay.LoRA(r=2, **QV), inlay.Parallel(reduction_factor=4)], "no LoRA beside Parallel adapter"),
        ("adapterhub", inlay.LoRA(r=2), "AdapterHub has no place at model.layers.0"),
        ("adapterhub", inlay.IA3(targets="qv", feedforward=["q_proj"]), "scales what model.layers.0.self_attn.q_proj"),
        ("adapterhub", inlay.PrefixTuning(3), "counts a row's positions from behind its prefix"),
        ("adapterhub", inlay.PromptTuning(3), "puts a prompt behind the positions"),
        ("adapterhub", inlay.OFT(oft_block_size=4, **QV), "AdapterHub has no OFT"),
        ("loralib", inlay.IA3(), "loralib has no IA³"),
        ("lora", inlay.LoReFT(r=2), "acts on the residual stream"),
    ],
)
def test_what_a_format_has_no_place_for_leaves_nothing(to, method, said, saved, tmp_path):
    source, out = saved(method), tmp_path / "new" / ("out.pt" if to == "loralib" else "out")
    refused(said, "--adapter", source, "--to", to, "--out", out)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_wrong_calls_are_told_before_anything_is_loaded(saved, tmp_path):
    source = saved(inlay.LoRA(r=2, **QV), notes=False)
    given = ("--adapter", source, "--base", "none/such")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refused("exists and is not empty", *given, "--to", "peft", "--out", tmp_path / "full")
    refused("name it out.safetensors", *given, "--to", "loralib", "--out", tmp_path / "out")
    refused("format 'word' is not known", *given, "--to", "word", "--out", tmp_path / "out")
    refused("says its alpha itself", "--adapter", saved(inlay.LoRA(r=2)), "--alpha", 3, "--to", "peft", "--out", "out")
