"""What HF PEFT, loralib and their wrappers write beside the usual: read as they read it, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json

import loralib
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import FormatError
from inlay.methods.head import ModulesToSave
from inlay.methods.peft_fields import COMMON
from inlay.methods.table import METHODS
from zoo import make, small

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def randomise(parameters, size=0.2):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * size)


def theirs(base, config, folder, **saving):
    """Save an adapter of the reference's with random parameters; its model."""
    model = peft.get_peft_model(base, config)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder, **saving)
    return model.eval()


def logits(base, folder):
    """Logits of `base` with the adapter in `folder`; the base's own are as they were."""
    bank = inlay.attach(base)
    plain = bank.model(input_ids=IDS).logits
    bank.load("a", folder)
    with bank.route(["a", None]):
        mixed = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(mixed[1], plain[1], **EXACT)
    bank.set("a")
    made = bank.model(input_ids=IDS).logits
    assert (made - plain).abs().max() > 1e-3
    return made


def reloaded(base, folder):
    return peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=IDS).logits


def edit(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(folder, name):
    tensors = load_file(folder / TENSORS)
    save_file({name(key): value for key, value in tensors.items()}, folder / TENSORS)


# ---- fields of the config


def plain(value):
    return value.value if isinstance(value, enum.Enum) else value


def declared(kind):
    """Fields of a config of the reference that it writes, with their defaults."""
    found = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory
        found[field.name] = plain(field.default if made is dataclasses.MISSING else made())
    found.pop("runtime_config", None)  # never written
    return found


KINDS = {t.name: kind for t, kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.mark.parametrize("name", sorted({kind.peft_type for kind in METHODS.values()} & KINDS.keys()))
def test_the_table_of_fields_is_that_of_the_reference(name):
    fields = next(kind.peft_fields for kind in METHODS.values() if kind.peft_type == name)
    assert fields is not None, f"methods/peft_fields.py has no table for {name}"
    ours, reference = fields.defaults(), declared(KINDS[name])
    assert reference.keys() - ours.keys() == set(), "fields that HF PEFT knows and the table does not"
    assert ours.keys() - reference.keys() == set(), "fields that HF PEFT no longer has"
    assert ours == reference
    groups = [fields.read, fields.passed, fields.refused, COMMON.read, COMMON.passed]
    assert sum(map(len, groups)) == len(ours), "a field stands in two groups"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    theirs(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), folder)
    return folder


@pytest.fixture
def saved(lora, tmp_path):
    for name in (TENSORS, CONFIG):
        (tmp_path / name).write_bytes((lora / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"new_gate": 3}, "new_gate to 3, which Inlay does not know"),
        ({"lora_bias": True}, "lacks the tensor .*lora_B.bias"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_x"),
        ({"init_lora_weights": 5}, "init_lora_weights=5"),
        ({"enable_lora": [True, False]}, "enable_lora"),
        ({"trainable_token_indices": [3]}, "lacks the tensor .*trainable_tokens_delta"),
    ],
)
def test_a_field_that_is_neither_known_nor_at_its_default_is_refused_by_name(saved, fields, said):
    edit(saved, **fields)
    bank = inlay.attach(make("llama"))
    with pytest.raises(FormatError, match=said):
        bank.load("a", saved)
    assert not bank.adapters


def test_empty_fields_of_other_releases_are_no_settings(saved):
    before = logits(make("llama"), saved)
    edit(saved, new_gate=None, other={}, enable_lora=None, merge_weights=False, corda_config={"corda_method": "ipm"})
    assert torch.equal(logits(make("llama"), saved), before)


# ---- weights of the base in the file


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_saved_tables_and_heads_are_compared_with_the_base(tied, trained, tmp_path):
    """Where they differ they are the adapter's own; the reference writes them into the base."""

    def base():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small(), tie_word_embeddings=tied)).double().eval()

    other = base()
    if trained:
        other.model.embed_tokens.weight.data[5:9] += 0.5
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    expected = theirs(other, config, tmp_path)(input_ids=IDS).logits
    assert any("embed_tokens.base_layer" in key for key in load_file(tmp_path / TENSORS))
    made = logits(base(), tmp_path)
    torch.testing.assert_close(made, expected, **EXACT)
    torch.testing.assert_close(reloaded(base(), tmp_path), expected, **EXACT)
    bank = inlay.attach(base())
    adapter = bank.load("a", tmp_path)
    assert any(isinstance(m, ModulesToSave) for m in adapter.methods) == trained
    bank.save("a", tmp_path / "again")
    torch.testing.assert_close(logits(base(), tmp_path / "again"), expected, **EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_layers_saved_without_being_targets(name, tmp_path):
    """save_embedding_layers=True writes the tables of any adapter, as does a resized vocabulary."""
    other = make(name)
    other.resize_token_embeddings(53)
    config = peft.LoraConfig(r=2, target_modules=["c_attn" if name == "gpt2" else "q_proj"])
    expected = theirs(other, config, tmp_path, save_embedding_layers=True)(input_ids=IDS).logits
    bank = inlay.attach(make(name))
    with pytest.raises(FormatError, match=r"resized to 53 entries.*the base 48.*resize_token_embeddings\(53\)"):
        bank.load("a", tmp_path)
    assert not bank.adapters
    base = make(name)
    base.resize_token_embeddings(53)
    torch.testing.assert_close(logits(base, tmp_path), expected, **EXACT)


def test_lora_on_a_resized_vocabulary_says_so(tmp_path):
    other = make("llama")
    other.resize_token_embeddings(53)
    theirs(other, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path, save_embedding_layers=False)
    with pytest.raises(FormatError, match="resized to 53 entries"):
        inlay.attach(make("llama")).load("a", tmp_path)


def test_prompts_with_the_tables_beside_them(tmp_path):
    config = peft.PromptTuningConfig(
        num_virtual_tokens=2, token_dim=16, num_layers=2, num_attention_heads=4, task_type="CAUSAL_LM"
    )
    expected = theirs(make("llama"), config, tmp_path, save_embedding_layers=True)(input_ids=IDS).logits[:, -6:]
    torch.testing.assert_close(logits(make("llama"), tmp_path), expected, **EXACT)


def test_a_changed_weight_in_bfloat16_is_told_from_rounding(saved):
    tensors = load_file(saved / TENSORS)
    own = make("llama").model.layers[0].mlp.up_proj.weight.detach()
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, key: own.bfloat16()}, saved / TENSORS)
    adapter = inlay.attach(make("llama")).load("a", saved)
    assert [m.title for m in adapter.methods] == ["LoRA"]
    save_file({**tensors, key: own.bfloat16() * 1.02}, saved / TENSORS)
    adapter = inlay.attach(make("llama")).load("a", saved)
    assert [m.title for m in adapter.methods] == ["Modules to save", "LoRA"]


# ---- names

WRAPPED = {
    "compiled": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda k: "_orig_mod." + k,
    "parallel": lambda k: "module." + k,
    "parallel inside": lambda k: k.replace("base_model.model.", "base_model.model.module."),
    "fsdp": lambda k: k.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "checkpointed": lambda k: k.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "adapter": lambda k: k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
    "named": lambda k: k.replace("lora_A", "lora_A.my-own").replace("lora_B", "lora_B.my-own"),
    "bare": lambda k: k.removeprefix("base_model.model."),
    "all": lambda k: "module._orig_mod." + k.replace("lora_A", "lora_A.x").replace("lora_B", "lora_B.x"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_are_no_part_of_a_name(how, saved):
    expected = logits(make("llama"), saved)
    rename(saved, WRAPPED[how])
    assert torch.equal(logits(make("llama"), saved), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_raw_state_dicts_of_saved_modules(name, tmp_path):
    """Adapter names, the wrapper of a saved module and its copy of the base's, as `model.state_dict()` has them."""
    own = {"bert": ["cls.predictions.transform.dense"], "gpt2": ["lm_head"]}[name]
    target = {"bert": ["query"], "gpt2": ["c_attn"]}[name]
    model = theirs(make(name), peft.LoraConfig(r=2, target_modules=target, modules_to_save=own), tmp_path)
    expected = model(input_ids=IDS).logits
    raw = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k or "modules_to_save" in k or "orig" in k}
    save_file({"module." + k: v for k, v in raw.items()}, tmp_path / TENSORS)
    torch.testing.assert_close(logits(make(name), tmp_path), expected, **EXACT)
    save_file(raw | {k.replace("default", "b"): v.clone() for k, v in raw.items() if "lora" in k}, tmp_path / TENSORS)
    with pytest.raises(FormatError, match="several adapters: b, default"):
        inlay.attach(make(name)).load("a", tmp_path)


def test_a_state_dict_of_the_whole_model_holds_an_adapter(saved):
    """Some save all that a wrapped model has: the base's own weights are compared and left out."""
    model = peft.PeftModel.from_pretrained(make("llama"), saved)
    expected = logits(make("llama"), saved)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, saved / TENSORS)
    assert torch.equal(logits(make("llama"), saved), expected)
    bank = inlay.attach(make("llama", seed=1))
    adapter = bank.load("a", saved)  # of another base: its weights are the adapter's own
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    assert [m.title for m in adapter.methods] == ["Modules to save", "LoRA"]


def test_earlier_names_of_a_model_that_sees(tmp_path):
    """What was saved before transformers moved the parts of such models."""
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    expected = theirs(make("llava"), config, tmp_path)(input_ids=IDS).logits
    rename(tmp_path, lambda k: k.replace("model.language_model.layers", "language_model.model.layers"))
    edit(tmp_path, target_modules=["q_proj"], exclude_modules=".*vision.*")
    torch.testing.assert_close(logits(make("llava"), tmp_path), expected, **EXACT)
    torch.testing.assert_close(reloaded(make("llava"), tmp_path), expected, **EXACT)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*0\.mlp.*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.1\..*_proj", "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
        {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"1.*k_proj": 9, "proj": 5}},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "bias": "all"},
    ],
)  # fmt: skip
def test_modules_are_named_by_the_rules_of_the_reference(fields, tmp_path):
    expected = theirs(make("llama"), peft.LoraConfig(r=2, **fields), tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(logits(make("llama"), tmp_path), expected, **EXACT)
    tensors = load_file(tmp_path / TENSORS)
    lost = sorted(tensors)[-1].rpartition("lora_")[0] or sorted(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if not k.startswith(lost)}, tmp_path / TENSORS)
    with pytest.raises(FormatError, match=r"targets|lacks"):
        inlay.attach(make("llama")).load("a", tmp_path)


# ---- loralib's biases


@pytest.mark.parametrize("kind", ["none", "all", "lora_only"])
def test_biases_of_loralib_are_carried(kind, tmp_path):
    model = make("gpt_neox")
    for block in model.gpt_neox.layers:
        old = block.mlp.dense_4h_to_h
        new = loralib.Linear(old.in_features, old.out_features, r=2, lora_alpha=3).double()
        new.weight.data, new.bias.data = old.weight.data.clone(), old.bias.data.clone()
        block.mlp.dense_4h_to_h = new
    for name, p in model.named_parameters():
        if "lora_" in name or (kind == "all" and name.endswith("bias")) or (kind != "none" and "4h_to_h.bias" in name):
            randomise([p])
    save_file({k: v.clone() for k, v in loralib.lora_state_dict(model, kind).items()}, tmp_path / "x.safetensors")
    bank = inlay.attach(make("gpt_neox"))
    bank.load("a", tmp_path / "x.safetensors", alpha=3)
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, **EXACT)


# ---- LoRA that began inside of the base


STARTS = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]}),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": ["k_proj", "down_proj"]}),
    "pissa on Conv1D": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}),
    "olora on Conv1D": ("gpt2", {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"]}),
    "rslora": ("bert", {"init_lora_weights": "pissa", "target_modules": ["query"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 7}, "use_rslora": True,
        },
    ),
    "dora": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj"], "use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", STARTS)
def test_starts_inside_of_the_base_are_taken_out_again(case, dtype, tmp_path):
    """The reference decomposes in float32: a float64 base here holds the same values, and its error."""
    name, fields = STARTS[case]
    theirs(make(name, dtype=torch.float32), peft.LoraConfig(r=2, lora_alpha=6, **fields), tmp_path)
    reference = peft.PeftModel.from_pretrained(make(name, dtype=torch.float32), tmp_path).eval().to(dtype)
    expected = reference(input_ids=IDS).logits
    bank = inlay.attach(make(name, dtype=torch.float32).to(dtype))
    bank.load("a", tmp_path)
    bank.set("a")
    made = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=3e-5)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name, dtype=torch.float32).to(dtype), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, made, rtol=1e-4, atol=3e-5)


def test_a_start_drawn_at_random_is_read_where_the_draw_does_not_matter(tmp_path):
    def base(steep):
        model = make("llama", dtype=torch.float32)
        for block in model.model.layers:
            u, s, v = torch.linalg.svd(block.self_attn.q_proj.weight.data)
            block.self_attn.q_proj.weight.data = u @ torch.diag(s * 0.1 ** torch.arange(len(s)) if steep else s) @ v
        return model

    config = peft.LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["q_proj"])
    theirs(base(True), config, tmp_path)
    bank = inlay.attach(base(True))
    bank.load("a", tmp_path)
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, reloaded(base(True), tmp_path), rtol=1e-3, atol=1e-3)
    edit(tmp_path, init_lora_weights="pissa_niter_0")
    with pytest.raises(FormatError, match=r"drawn at random.*differ by [\d.]+% of model.layers.0.self_attn.q_proj"):
        inlay.attach(base(False)).load("a", tmp_path)


# ---- ours there


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "alone"])
def test_modules_of_a_causal_base_go_both_ways(name, method, tmp_path):
    saved = ModulesToSave(targets=["lm_head", "ln_f" if name == "gpt2" else "model.norm"])
    made = {
        "lora": [inlay.LoRA(r=2), saved],
        "ia3": [inlay.IA3(), saved],
        "prompt": [inlay.PromptTuning(num_virtual_tokens=2), saved],
        "alone": [saved],
    }[method]
    bank = inlay.attach(make(name))
    bank.add("a", made, seed=1)
    randomise(bank.parameters())
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]
    torch.testing.assert_close(logits(make(name), tmp_path), expected, **EXACT)
    near = {"rtol": 1e-4, "atol": 1e-5} if method == "prompt" else EXACT  # the reference has prompts in float32
    torch.testing.assert_close(reloaded(make(name), tmp_path)[:, -6:], expected, **near)


def test_an_adapter_of_a_merged_base_names_that_base(tmp_path):
    model = make("llama")
    model.config._name_or_path = "some/base"
    bank = inlay.attach(model)
    before = bank.fingerprint
    bank.add("a", inlay.LoRA(r=2), seed=1)
    randomise(bank.parameters())
    bank.save("a", tmp_path / "a")
    bank.merge("a")
    bank.add("b", inlay.LoRA(r=2), seed=2)
    randomise(bank.parameters())
    bank.save("b", tmp_path / "b")
    notes = {name: json.loads((tmp_path / name / "inlay.json").read_text()) for name in "ab"}
    assert notes["a"] == {"base": "some/base", "fingerprint": before}
    assert notes["b"] == {"base": "", "fingerprint": inlay.attach(copy.deepcopy(model)).fingerprint}
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["base_model_name_or_path"] == ""
    with pytest.raises(FormatError, match="another base"):
        inlay.attach(make("llama")).load("b", tmp_path / "b")
    bank.load("again", tmp_path / "b")


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tied_adapters_of_tied_layers_load(fields, tmp_path):
    def base():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small(), tie_word_embeddings=True)).double().eval()

    config = peft.LoraConfig(r=2, ensure_weight_tying=True, **{"target_modules": ["q_proj"], **fields})
    theirs(base(), config, tmp_path)
    torch.testing.assert_close(logits(base(), tmp_path), reloaded(base(), tmp_path), **EXACT)
