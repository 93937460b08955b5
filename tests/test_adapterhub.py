"""AdapterHub's folders go both ways; golden/make_adapterhub_files.py has what it saved, and what it makes of ours."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import inlay
import test_bottleneck
from adapterhub import MENDED, SCALED, THEIRS, WRITTEN, Saved, base_of, inputs_of, scaling_inputs
from inlay.errors import FormatError, UsageError
from inlay.formats.support import ADAPTERHUB_CONFIGS, PEFT_TYPES
from inlay.methods.table import METHODS
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 0, "atol": 2e-5}
"""Of logits: the files hold float32."""
REFUSED = {
    ("files_bert", "dora"): "multiplies the bias",
    ("files_gemma2", "seq_bn"): "which AdapterHub computes otherwise in a gemma2 model",
    ("files_phi", "seq_bn"): "which AdapterHub computes otherwise in a phi model",
    ("files_bert", "prompt_tuning"): "prompt tuning: AdapterHub puts a prompt behind",
    ("files_llama_linear", "mtl_lora"): "MTL-LoRA (mtl_lora), which Inlay does not have yet",
}
"""What AdapterHub saved and Inlay does not read, and what it says."""
UNWRITTEN = {("files_llama_others", "direft"): "takes every DiReFT that it opens for NoReFT"}
"""What is read and not written, and what is said."""


@cache
def whole_bank(base):
    model = base_of(base)
    if base == "gemma2":  # older transformers choose sdpa for it, which has no softcaps
        model.set_attn_implementation("eager")
    return inlay.attach(model)


def bank_of(base):
    """The one bank over a base, without adapters."""
    bank = whole_bank(base)
    bank.set(None)
    for name in [*bank.adapters]:
        bank.remove(name)
    return bank


def opened(saved, folder):
    """A bank with the adapter, in force, and its logits."""
    bank = bank_of(saved.base)
    bank.load("a", saved.to(folder))
    return bank, logits(bank, "a", saved.base)


def logits(bank, name, base):
    bank.set(name)
    return bank.model(**inputs_of(base)).logits.detach()


@pytest.mark.parametrize(("file", "kind"), [spot for spot in THEIRS if spot not in REFUSED])
def test_what_adapterhub_saved_gives_its_logits_here(file, kind, tmp_path):
    saved = Saved(file, kind)
    saved.say_subtraction(kind)
    _, made = opened(saved, tmp_path)
    torch.testing.assert_close(made, saved.logits, **CLOSE)


@pytest.mark.parametrize(("file", "kind"), WRITTEN)
def test_what_is_written_here_gives_its_logits_in_adapterhub(file, kind, tmp_path):
    saved, there = Saved(file.replace("written", "files"), kind), Saved(file, kind)
    saved.say_subtraction(kind)
    bank, made = opened(saved, tmp_path / "theirs")
    torch.testing.assert_close(made, there.logits, **CLOSE)  # what AdapterHub made of the file that is written next
    bank.save("a", tmp_path / "ours", format="adapterhub")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {**config, "name": there.config["name"]} == there.config
    tensors = load_file(tmp_path / "ours" / "adapter.safetensors")
    tensors = {key.replace(".a.", f".{there.config['name']}."): value for key, value in tensors.items()}
    assert tensors.keys() == there.tensors.keys()
    for key, value in tensors.items():
        if not key.endswith(".base"):  # columns of a basis that nothing reads have many right values
            torch.testing.assert_close(value.float(), there.tensors[key], rtol=1e-5, atol=1e-5)
    bank.load("b", tmp_path / "ours")
    torch.testing.assert_close(logits(bank, "b", saved.base), made, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("file", "kind"), list(REFUSED))
def test_what_is_not_read_is_refused_by_its_name(file, kind, tmp_path):
    saved = Saved(file, kind)
    with pytest.raises(FormatError) as error:
        opened(saved, tmp_path)
    assert REFUSED[file, kind] in str(error.value)


@pytest.mark.parametrize(("file", "kind"), list(UNWRITTEN))
def test_what_adapterhub_cannot_open_is_not_written(file, kind, tmp_path):
    saved = Saved(file, kind)
    saved.say_subtraction(kind)
    bank, _ = opened(saved, tmp_path / "theirs")
    with pytest.raises(UsageError, match=UNWRITTEN[file, kind]):
        bank.save("a", tmp_path / "ours", format="adapterhub")
    assert not (tmp_path / "ours").exists()


def test_all_that_is_read_is_written_too():
    read = {
        (file.removeprefix("files_"), kind) for file, kind in THEIRS if (file, kind) not in {**REFUSED, **UNWRITTEN}
    }
    assert read == {(file.removeprefix("written_"), kind) for file, kind in WRITTEN}


def test_every_config_of_adapterhub_is_answered():
    assert {kind for _, kind in THEIRS} >= set(ADAPTERHUB_CONFIGS)


@pytest.mark.parametrize("string", list(ADAPTERHUB_CONFIGS))
def test_the_methods_page_says_which_strings_load_and_are_saved(string):
    page = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf8")
    page = page.partition("## AdapterHub's 22")[2]
    row = re.search(rf"^\| {re.escape(string)} \| [^|]+ \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    files = [file for file, kind in THEIRS if kind == string]
    read = [file for file in files if (file, string) not in REFUSED]
    whole = len(read) == len(files) and string not in MENDED
    saved = [file for file, kind in WRITTEN if kind == string]
    assert row[1].startswith("yes" if whole else "in part: " if read else "no")
    assert row[2].startswith("yes" if saved else "no") and len(saved) in (0, len(read))


@pytest.mark.parametrize("kind", list(peft.PeftType))
def test_every_type_of_hf_peft_is_answered(kind, tmp_path):
    assert kind.value in PEFT_TYPES
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind.value}))
    bank = bank_of("llama")
    with pytest.raises((FormatError, UsageError)) as error:
        bank.load("a", tmp_path)
    read = any(method.peft_type == kind.value for method in METHODS.values())
    said = (
        "holds no adapter_model" if read else f"{PEFT_TYPES[kind.value]} ({kind.value}), which Inlay does not have yet"
    )
    assert said in str(error.value)


def test_a_type_that_nobody_has_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NONE_SUCH"}))
    with pytest.raises(FormatError, match="'NONE_SUCH', which neither HF PEFT"):
        bank_of("llama").load("a", tmp_path)


# ---- files that are broken, and heads


def changed(kind, edit, file="files_llama_linear"):
    saved = Saved(file, kind)
    edit(saved)
    return saved


def settings(**given):
    return lambda saved: saved.config["config"].update(given)


def without(part):
    return lambda saved: saved.tensors.pop(next(key for key in saved.tensors if part in key))


def renamed(old, new):
    def edit(saved):
        saved.tensors = {key.replace(old, new): value for key, value in saved.tensors.items()}

    return edit


def misshapen(part):
    return lambda saved: saved.tensors.update({key: saved.tensors[key][:1] for key in saved.tensors if part in key})


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("lora", without("layers.1.self_attn.v_proj.loras.theirs.lora_B"), "lacks model.layers.1.self_attn.v_proj"),
        ("lora", renamed("layers.1", "layers.7"), "adapts 'model.layers.7.self_attn.q_proj', which is no linear layer"),
        ("lora", renamed(".theirs.", ".other."), "is of no adapter called 'theirs'"),
        ("lora", misshapen("layers.0.self_attn.q_proj"), "has the shape"),
        ("lora", settings(attn_matrices=["q", "k", "v"]), "names the matrix 'k' but holds nothing for it"),
        ("lora", settings(output_lora=True), "names a layer of each MLP but holds nothing for it"),
        ("lora", settings(leave_out=[1]), "holds tensors for model.layers.1"),
        ("lora", settings(r="two"), "is wrong"),
        ("lora", settings(anew=1), "sets anew to 1, which Inlay does not know"),
        ("lora", lambda saved: saved.config["config"].pop("r"), "lacks the field 'r'"),
        ("lora", lambda saved: saved.config.update(config="lora"), "holds no settings"),
        ("lora", settings(architecture="none_such"), "'none_such', which neither AdapterHub 1.3 nor Inlay has"),
        ("ia3", settings(use_gating=True), "IA³ with a gate"),
        ("ia3", settings(alpha=float("nan")), "sets alpha to nan"),
        ("lora", settings(composition_mode="times"), "sets composition_mode to 'times'"),
        ("lora", settings(attn_matrices=["q"]), "adapts the matrix 'v', which its config does not name"),
        ("lora_mlp_alone", settings(output_lora=False, selfattn_lora=True, attn_matrices=[]), "adapts layers of MLPs"),
        ("vera", without("shared_parameters"), "lacks the matrices that VeRA's layers share"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, edit, said, tmp_path):
    bank = bank_of("llama")
    with pytest.raises(FormatError) as error:
        bank.load("a", changed(kind, edit).to(tmp_path))
    assert said in str(error.value) and not bank.adapters


@pytest.mark.parametrize(
    ("file", "kind", "edit", "said"),
    [
        ("bottlenecks", "seq_bn", without("layers.1"), "lacks it"),
        ("bottlenecks", "seq_bn", settings(reduction_factor=8), "should be of shape (2, 16)"),
        ("bottlenecks", "seq_bn", settings(reduction_factor={"0": 4, "default": 8}), "should be of shape (2, 16)"),
        ("bottlenecks", "seq_bn", settings(reduction_factor={"0": 4}), "no number for block 1, nor a default"),
        ("bottlenecks", "seq_bn", settings(mh_adapter=True), "lacks the adapter behind the attention"),
        ("bottlenecks", "seq_bn", settings(non_linearity="sine"), "non_linearity 'sine'"),
        ("bottlenecks", "seq_bn_inv", without("invertible_adapters"), "lacks invertible_adapters.F"),
        ("bottlenecks", "seq_bn_inv", settings(inv_adapter="glow"), "which AdapterHub itself cannot run"),
        ("bottlenecks", "compacter", without("phm_rule"), "lacks the shared phm_rule"),
        ("others", "loreft", without("units.0.projection"), "lacks model.layers.0.reft_layer"),
        ("others", "loreft", settings(layers=[1]), "holds a ReFT at model.layers.0.reft_layer"),
        ("others", "loreft", settings(tied_weights=True), "ties the weights of both ends and holds two"),
        ("others", "noreft", settings(), "is NoReFT or DiReFT"),
        ("bottlenecks", "seq_bn", settings(reduction_factor={}), "reduction_factor is {}"),
        (
            "others",
            "prefix_tuning",
            without("model.prefix_tuning.prefix_tunings.theirs.self_prefix.wte"),
            "lacks self_",
        ),
        ("others", "prefix_tuning_flat", settings(prefix_length=2), "the base needs 2 times 32"),
        ("others", "prefix_tuning_flat", settings(leave_out=[0]), "sets leave_out to [0]"),
        ("unipelt", "unipelt", without("prefix_gates"), "lacks the gate of model.layers."),
    ],
)
def test_other_files_that_do_not_fit_are_refused_by_name(file, kind, edit, said, tmp_path):
    bank = bank_of("llama")
    with pytest.raises(FormatError) as error:
        bank.load("a", changed(kind, edit, f"files_llama_{file}").to(tmp_path))
    assert said in str(error.value) and not bank.adapters


def head(folder, tensors):
    (folder / "head_config.json").write_text(json.dumps({"config": None, "name": "theirs"}))
    torch.save(tensors, folder / "pytorch_model_head.bin")


def test_the_head_beside_an_adapter_is_read_where_the_base_has_it(tmp_path):
    saved, bank = Saved("files_llama_linear", "lora"), bank_of("llama")
    folder, weight = saved.to(tmp_path), bank.model.lm_head.weight.detach()
    head(folder, {"lm_head.weight": weight.clone()})
    assert [method.title for method in bank.load("same", folder).methods] == ["LoRA"]
    torch.testing.assert_close(logits(bank, "same", "llama"), saved.logits, **CLOSE)
    head(folder, {"lm_head.weight": weight * 2})
    bank.load("trained", folder)
    torch.testing.assert_close(logits(bank, "trained", "llama"), saved.logits * 2, rtol=0, atol=4e-5)
    head(folder, {"heads.theirs.1.weight": torch.zeros(2, 16)})
    with pytest.raises(FormatError, match="of a head of AdapterHub's own"):
        bank.load("own", folder)


def test_an_older_releases_lora_has_no_alpha(tmp_path):
    new, old = Saved("files_llama_linear", "lora"), Saved("files_llama_linear", "lora")
    new.config["config"]["alpha"], old.config["version"] = 2, "adapters.1.0.1"
    expected = opened(new, tmp_path / "new")[1]
    torch.testing.assert_close(opened(old, tmp_path / "old")[1], expected, rtol=0, atol=0)


def test_a_file_from_a_model_without_a_head_is_read_too(tmp_path):
    saved = Saved("files_llama_linear", "lora")
    renamed("model.layers", "layers")(saved)
    torch.testing.assert_close(opened(saved, tmp_path)[1], saved.logits, **CLOSE)


def test_several_sizes_in_an_encoder_decoder_are_refused(tmp_path):
    saved = changed("seq_bn", settings(reduction_factor={"0": 4, "default": 8}), "files_llama_bottlenecks")
    with pytest.raises(FormatError, match="several reduction_factors in an encoder-decoder"):
        inlay.attach(test_bottleneck.base_of("t5")).load("a", saved.to(tmp_path))


@pytest.mark.parametrize("base", SCALED)
def test_a_scale_of_what_a_layer_reads_is_written_as_one_of_what_another_gives(base, tmp_path):
    bank, there = scaling_inputs(base), Saved(f"inputs_{base}", "ia3")
    made = logits(bank, "a", base)
    torch.testing.assert_close(made, there.logits, **CLOSE)
    bank.save("a", tmp_path, format="adapterhub")
    stored = load_file(tmp_path / "adapter.safetensors")
    assert stored.keys() == there.tensors.keys()
    assert all(torch.equal(value.float(), there.tensors[key]) for key, value in stored.items())
    bank.load("b", tmp_path)
    torch.testing.assert_close(logits(bank, "b", base), made, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", ["gpt2", "bert"])
def test_it_is_refused_where_no_other_layer_does_the_same(base, tmp_path):
    with pytest.raises(UsageError, match="AdapterHub scales what a layer gives"):
        scaling_inputs(base).save("a", tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_an_encoder_decoders_bottlenecks_are_read(kind, tmp_path):
    golden = test_bottleneck.GOLDEN
    saved = Saved("files_llama_bottlenecks", "double_seq_bn" if kind == "houlsby" else "seq_bn")
    settings(leave_out=[])(saved)
    saved.config["name"], start = kind, f"t5/{kind}/"
    saved.tensors = {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start) and "logits" not in k}
    bank, ids = inlay.attach(test_bottleneck.base_of("t5")), golden["t5/ids"]
    bank.load("a", saved.to(tmp_path))
    bank.set("a")
    made = bank.model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids.flip(1)).logits
    torch.testing.assert_close(made, golden[f"{start}logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ([inlay.LoRA(r=2)], "AdapterHub has no place at model.layers.0"),
        ([inlay.LoRA(r=2, targets=["embed_tokens"])], "is no linear layer of a block"),
        ([inlay.NormTuning()], "AdapterHub has no Norm tuning"),
        ([inlay.OFT(oft_block_size=4, targets="qv")], "AdapterHub has no OFT"),
        ([inlay.BitFit(add_bias=True, targets="qv")], "shifts what"),
        ([inlay.IA3(), inlay.LoRA(r=2, targets=["up_proj"])], "no place for IA³ beside LoRA at one layer"),
        ([inlay.LoRA(r=2, targets=["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"])], "one list"),
        ([inlay.LoRA(r=2, targets="qv"), inlay.VeRA(r=2, targets="qv")], "no place for LoRA beside VeRA at one layer"),
        ([inlay.LoRA(r=2, targets="qv"), inlay.IA3(targets=["k_proj"], feedforward=[])], "not do the same at all"),
        ([inlay.Invertible(undo=False)], "beside a bottleneck of the same non_linearity alone"),
        ([inlay.Pfeiffer(), inlay.Invertible()], "for heads of its own alone"),
        ([inlay.PrefixTuning(2)], "counts a row's positions from behind its prefix"),
        ([inlay.PromptTuning(2)], "puts a prompt behind the positions"),
        ([inlay.ModulesToSave(targets=["lm_head"])], "own modules are not written"),
    ],
)
def test_what_adapterhub_has_no_place_for_is_refused_and_leaves_nothing(methods, said, tmp_path):
    bank = bank_of("llama")
    bank.add("a", methods, seed=0)
    with pytest.raises(UsageError) as error:
        bank.save("a", tmp_path / "out", format="adapterhub")
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_bases_that_nobody_compared_are_refused(tmp_path):
    bank = inlay.attach(make("gpt_neox"))
    bank.add("a", inlay.Houlsby(reduction_factor=4))
    with pytest.raises(UsageError, match="how AdapterHub names the parts of a gpt_neox model"):
        bank.save("a", tmp_path / "out", format="adapterhub")
    with pytest.raises(FormatError, match="bottlenecks of AdapterHub's in a gpt_neox model"):
        bank.load("b", Saved("files_llama_bottlenecks", "seq_bn").to(tmp_path))


def test_products_of_unlike_ranks_and_scales_are_written_as_one_lora(tmp_path):
    bank = bank_of("llama")
    adapter = bank.add(
        "a", inlay.LoRA(r=3, alpha=4, targets="qv", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5})
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    expected = logits(bank, "a", "llama")
    bank.save("a", tmp_path, format="adapterhub")
    bank.load("b", tmp_path)
    torch.testing.assert_close(logits(bank, "b", "llama"), expected, rtol=0, atol=1e-10)
