"""`inlay convert --to vllm`: what is written keeps the rules of vLLM's loader, and what breaks one is named."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import inlay
from inlay.bases.load import Base
from inlay.cli.app import app
from inlay.errors import UsageError
from inlay.formats.vllm_rules import FAMILIES, RANKS, VOCABULARY, WITHOUT, rank_for, refusals
from inlay.merging.as_lora import as_lora
from inlay.merging.vllm import as_vllm, evened
from serving import REVIEW
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
QV = {"targets": "qv"}
UNEVEN = {"rank_pattern": {"mlp.*": 2}, "alpha_pattern": {"mlp.*": 7, "q_proj": 5}}


def filled(bank, method, name="a"):
    adapter = bank.add(name, method, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return adapter


def logits(bank, name):
    bank.set(name)
    return bank.model(input_ids=IDS).logits.detach()


# ---- one rank and one scale


@pytest.mark.parametrize("settings", [{}, UNEVEN, {"use_rslora": True, "rank_pattern": {"o_proj": 1}}])
def test_ranks_and_scales_are_made_even_without_a_change(settings):
    bank = inlay.attach(make("llama"))
    made = evened(as_lora(filled(bank, inlay.LoRA(r=3, alpha=4, **settings))))
    assert not made.method.rank_pattern and not made.method.alpha_pattern and made.method.r == 3
    expected = logits(bank, "a")
    adapter = bank.add("made", made.method, seed=0)
    with torch.no_grad():
        for path, own in adapter.params.items():
            for name, parameter in own.items():
                parameter.copy_(made.values[path][name])
    torch.testing.assert_close(logits(bank, "made"), expected, rtol=0, atol=1e-12)


# ---- the rules

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {f"{Q}.lora_A.weight": (3, 16), f"{Q}.lora_B.weight": (16, 3)}
TABLE = "base_model.model.model.embed_tokens"


def broken(config=None, shapes=None, model="LlamaForCausalLM", vocabulary=48):
    return refusals({**CONFIG, **(config or {})}, SHAPES if shapes is None else shapes, model, vocabulary)


def test_what_keeps_the_rules_is_not_refused():
    assert broken() == []
    table = {f"{TABLE}.lora_embedding_A": (3, 48), f"{TABLE}.lora_embedding_B": (16, 3)}
    head = {"base_model.model.lm_head.lora_A.weight": (3, 16), "base_model.model.lm_head.lora_B.weight": (48, 3)}
    assert broken(shapes={**SHAPES, **table, **head}) == []
    assert broken({"use_rslora": True, "init_lora_weights": "eva", "modules_to_save": None, "rank_pattern": {}}) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "IA3", "LoRA alone"),
        ("r", None, "needs the field r"),
        ("lora_alpha", None, "needs the field lora_alpha"),
        ("target_modules", None, "needs the field target_modules"),
        ("r", 0, "a rank of 1 or more"),
        ("use_dora", True, "no DoRA"),
        ("bias", "lora_only", "no biases of the base"),
        ("lora_bias", True, "no bias beside B"),
        ("modules_to_save", ["lm_head"], "no whole modules"),
        ("modules_to_save", ["score"], "heads of its classifiers"),
        ("alora_invocation_tokens", [5], "no aLoRA"),
        ("layer_replication", [[0, 1]], "no layer_replication"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("use_qalora", True, "QA-LoRA"),
        ("rank_pattern", {"q_proj": 3}, "passed over"),
        ("alpha_pattern", {"q_proj": 3}, "passed over"),
        ("trainable_token_indices", [3], "single trained tokens"),
        ("target_parameters", ["mlp.experts.down_proj"], "experts"),
        ("init_lora_weights", "pissa", "changes the base"),
    ],
)
def test_a_setting_that_vllm_does_not_have_is_named(field, value, said):
    found = broken({field: value})
    assert any(said in line for line in found) and all(line.startswith("vLLM") for line in found), found


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "there are none"),
        ({f"{Q}.lora_A.weight": (3, 16)}, "has A alone"),
        ({**SHAPES, f"{Q}.lora_B.bias": (16,)}, "does not know tensors like"),
        ({**SHAPES, f"{Q}.lora_magnitude_vector": (16,)}, "does not know tensors like"),
        ({key.removeprefix("base_model.model."): shape for key, shape in SHAPES.items()}, "does not know tensors"),
        ({key.replace("q_proj", "qkv_proj"): shape for key, shape in SHAPES.items()}, "not known here to take LoRA at"),
        ({key.replace("layers", "h"): shape for key, shape in SHAPES.items()}, "not known here to take LoRA at"),
        ({**SHAPES, f"{Q}.lora_A.weight": (2, 16)}, "every rank from r"),
        ({**SHAPES, f"{Q}.lora_A.weight": (4, 3, 16)}, "takes matrices"),
        ({f"{TABLE}.lora_embedding_A": (3, 50), f"{TABLE}.lora_embedding_B": (16, 3)}, "table has 48 tokens"),
        ({f"{TABLE}.lora_A.weight": (3, 48), f"{TABLE}.lora_B.weight": (16, 3)}, "not known here to take LoRA at"),
    ],
)
def test_a_tensor_that_vllm_has_no_place_for_is_named(shapes, said):
    found = broken(shapes=shapes)
    assert any(said in line for line in found), found


def test_tables_are_adapted_in_the_models_that_list_them_alone():
    table = {f"{TABLE}.lora_embedding_A": (3, 48), f"{TABLE}.lora_embedding_B": (16, 3)}
    for model, family in FAMILIES.items():
        assert bool(broken(shapes=table, model=model)) is not bool(family.tables), model


def test_a_rank_has_the_least_room_that_there_is():
    assert [rank_for(rank) for rank in (1, 2, 8, 9, 33, 257, 512, 513)] == [1, 8, 8, 16, 64, 320, 512, None]
    wide = {f"{Q}.lora_A.weight": (RANKS[-1] + 1, 16), f"{Q}.lora_B.weight": (16, RANKS[-1] + 1)}
    assert broken({"r": RANKS[-1] + 1}, wide) == ["vLLM takes ranks up to 512, and this one has 513"]


def test_a_base_that_vllm_does_not_adapt_is_named():
    assert broken(model=WITHOUT[0]) == [f"vLLM 0.33 takes no LoRA beside {WITHOUT[0]}"]
    assert "is not known here" in broken(model="MambaForCausalLM")[0]
    assert "tokens at most" in broken(vocabulary=VOCABULARY + 1)[0]
    assert broken(model="Qwen2ForCausalLM", vocabulary=VOCABULARY + 1) == []


# ---- the command


@pytest.fixture
def saved(tmp_path):
    """A function that saves an adapter of a method beside a tiny base; its folder."""

    def save(method, base="llama", notes=None):
        place, folder = tmp_path / base, tmp_path / "source"
        make(base, dtype=torch.float32).save_pretrained(place)
        bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(place))
        filled(bank, method)
        bank.save("a", folder, notes={"base": str(place), **(notes or {})})
        return folder

    return save


def ran(source, out, *more):
    given = ["convert", "--adapter", source, "--to", "vllm", "--out", out, *more]
    return CliRunner().invoke(app, [str(argument) for argument in given])


def opened(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return config, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("base", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "nemotron"])
def test_lora_on_every_linear_layer_goes_to_vllm(base, saved, tmp_path):
    source, out = saved(inlay.LoRA(r=3, alpha=4, **UNEVEN), base), tmp_path / "out"
    done = ran(source, out, "--json")
    assert done.exit_code == 0, done.output
    found, (config, shapes) = json.loads(done.stdout), opened(out)
    model = type(tf.AutoModelForCausalLM.from_pretrained(tmp_path / base)).__name__
    assert refusals(config, shapes, model, 48) == [] and len(shapes) == 2 * len(config["target_modules"])
    assert found["max_difference"] < 1e-5 < found["largest_logit"] and found["max_lora_rank"] == 8
    assert shlex.split(found["command"]) == [
        "vllm", "serve", str(tmp_path / base), "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"out={out}",
    ]  # fmt: skip


def test_the_products_are_what_vllm_makes_of_the_files(saved, tmp_path):
    """vLLM multiplies B by lora_alpha / r: y = W x + B' A x, whatever the module."""
    out = tmp_path / "out"
    assert ran(saved(inlay.LoRA(r=3, alpha=4, **UNEVEN)), out).exit_code == 0
    base, config = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), opened(out)[0]
    values = load_file(out / "adapter_model.safetensors")
    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))
    bank.load("a", tmp_path / "source")
    with torch.no_grad():
        for key, a in values.items():
            if "lora_A" in key:
                b = values[key.replace("lora_A", "lora_B")] * (config["lora_alpha"] / config["r"])
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                base.get_submodule(path).weight += b @ a
        torch.testing.assert_close(base(input_ids=IDS).logits, logits(bank, "a"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "base", "said", "instead"),
    [
        (inlay.DoRA(r=2, **QV), "llama", "is no low-rank product", "`inlay merge` writes base and adapter"),
        (inlay.DoRA(r=2, **QV), "llama", "vLLM serves LoRA alone, and DoRA at", "Or give --rank"),
        (inlay.IA3(), "llama", "is no low-rank product", "`inlay merge` writes"),
        (inlay.PrefixTuning(3), "llama", "acts on keys and values", "Serve it with `inlay serve`"),
        (inlay.ALoRA(r=2, alora_invocation_tokens=[5]), "llama", "aLoRA at", "Serve it with `inlay serve`"),
        ([inlay.LoRA(r=2), inlay.NormTuning()], "llama", "acts on a norm", "`inlay merge` writes"),
        (inlay.LoRA(r=2), "gpt2", "takes no LoRA beside GPT2LMHeadModel", "`inlay merge` writes"),
        (inlay.LoRA(r=2), "opt", "which modules of OPTForCausalLM vLLM adapts is not known", "`inlay merge` writes"),
        (
            inlay.LoRA(r=2, targets=["embed_tokens"]),
            "mistral",
            "not known here to take LoRA at model.embed",
            "`inlay merge`",
        ),
        (inlay.LoRA(r=2, targets="experts"), "qwen3_moe", "LoRA of a mixture's experts", "`inlay merge` writes"),
    ],
)
def test_what_vllm_would_refuse_leaves_nothing(method, base, said, instead, saved, tmp_path):
    done = ran(saved(method, base), tmp_path / "out")
    text = " ".join(done.output.split())
    assert done.exit_code == 2 and said in text and instead in text, done.output
    assert not (tmp_path / "out").exists()


def test_tables_and_other_low_rank_products_go_along(saved, tmp_path):
    table = [inlay.LoRA(r=2, targets=["embed_tokens"]), inlay.VeRA(r=3)]
    done = ran(saved(table), tmp_path / "out", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["max_difference"] < 1e-5, done.output
    config, shapes = opened(tmp_path / "out")
    assert config["r"] == 3 and not config["rank_pattern"] and f"{TABLE}.lora_embedding_A" in shapes


def test_a_rank_makes_the_nearest_lora_and_people_are_told(saved, tmp_path):
    notes = {"template": REVIEW.to_dict()}
    done = ran(saved(inlay.DoRA(r=4, **QV), notes=notes), tmp_path / "out", "--rank", 2)
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "its rank" in text and "vllm serve" in text and "vLLM itself was not run" in text
    assert "put prompts into its words yourself" in text


def test_ranks_beyond_what_vllm_takes_are_refused():
    base = Base(make("llama"), None, "tiny", None, "", torch.float64)
    adapter = filled(inlay.attach(base.model), inlay.LoRA(r=RANKS[-1] + 1, targets=["q_proj"], layers=[0]))
    with pytest.raises(UsageError, match=r"ranks up to 512, and this one has 513\. Give --rank 512"):
        as_vllm(adapter, base)
