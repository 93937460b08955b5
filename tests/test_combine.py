"""Adapters combined into one: HF PEFT's numbers for each of its rules, exact sums of other methods, and the command."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from typer.testing import CliRunner

import inlay
from inlay.bank.rules import HOW
from inlay.cli.app import app
from inlay.errors import UsageError
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = {"rtol": 0, "atol": 1e-9}
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
TARGETS = {"llama": ["q_proj", "down_proj", "embed_tokens"], "gpt2": ["c_attn", "c_fc", "wte"]}
WEIGHTS = {"a": 0.25, "b": -1.0, "c": 2.25}


def loras(name, ranks, folder):
    """HF PEFT's model with an adapter of each rank, which act on different layers, and a bank that has loaded them."""
    targets, model = TARGETS[name], None
    for number, (adapter, rank) in enumerate(ranks.items()):
        own = targets if number < 2 else targets[:1]
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=own, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
        )
        if model is not None:
            model.add_adapter(adapter, config)
        else:
            model = peft.get_peft_model(make(name), config, adapter_name=adapter)
    model.double().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    bank = inlay.attach(make(name))
    for adapter in ranks:
        bank.load(adapter, folder / adapter)
    return model, bank


def settings_of(how):
    thins = how not in ("cat", "linear", "svd")
    ours = {"density": 0.4} if thins else {}
    if thins and "ties" in how:
        ours["signs"] = "frequency" if how == "ties" else "total"
    theirs = {"density": 0.4} if thins else {}
    if "signs" in ours:
        theirs["majority_sign_method"] = ours["signs"]
    if how in ("svd", "ties_svd"):
        ours["rank"], theirs["svd_rank"] = 3, 3
    return ours, theirs


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", list(TARGETS))
def test_every_rule_gives_the_numbers_of_the_reference(name, how, tmp_path):
    equal = how in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    model, bank = loras(name, dict.fromkeys(WEIGHTS, 4) if equal else {"a": 4, "b": 2, "c": 5}, tmp_path)
    ours, theirs = settings_of(how)
    inject = model.base_model.inject_adapter

    def seeded(*args, **settings):  # what it draws for the new adapter comes before
        inject(*args, **settings)
        torch.manual_seed(11)

    model.base_model.inject_adapter = seeded
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "new", combination_type=how, **theirs)
    model.set_adapter("new")
    bank.combine("new", WEIGHTS, how=how, seed=11, **ours)
    bank.set("new")
    logits = bank.model(input_ids=IDS).logits
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0, atol=1e-6)
    bank.set("a")
    assert float((bank.model(input_ids=IDS).logits - logits).abs().max()) > 1e-3


def shaken(bank):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def test_cat_is_the_exact_sum_of_whatever_is_a_product(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("lora", inlay.LoRA(r=3, use_rslora=True, rank_pattern={"q_proj": 5}), seed=1)
    bank.add("vera", inlay.VeRA(r=6, targets=["q_proj", "v_proj"]), seed=2)
    bank.add("loha", inlay.LoHa(r=2, targets="mlp"), seed=3)
    bank.add("heads", inlay.Selective(select="heads 0,1"))
    shaken(bank)
    weights = {"lora": 0.5, "vera": -2.0, "loha": 1.0, "heads": 0.3}
    with bank.route([weights]):
        expected = bank.model(input_ids=IDS).logits
    made = bank.combine("sum", weights)
    bank.set("sum")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    bank.combine("near", weights, how="svd", rank=16)
    bank.set("near")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    assert type(made.method) is inlay.LoRA and bank.adapters.keys() >= weights.keys()
    bank.save("sum", tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path).double().eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


REFUSED = {
    "of one rank": ({"a": 1.0, "wide": 1.0}, {"how": "linear"}),
    "needs a density": ({"a": 1.0, "b": 1.0}, {"how": "ties"}),
    "has no density": ({"a": 1.0, "b": 1.0}, {"how": "cat", "density": 0.5}),
    "has no rank": ({"a": 1.0, "b": 1.0}, {"how": "linear", "rank": 4}),
    "is IA³": ({"a": 1.0, "ia3": 1.0}, {}),
    "is DoRA": ({"a": 1.0, "dora": 1.0}, {}),
    "is Prefix tuning": ({"a": 1.0, "prefix": 1.0}, {}),
    "LoRA and BitFit": ({"a": 1.0, "parts": 1.0}, {}),
    "name no adapter": ({}, {}),
    "no adapter is called 'nobody'": ({"nobody": 1.0}, {}),
    "rule 'sum' is not known": ({"a": 1.0}, {"how": "sum"}),
}


def test_what_cannot_be_combined_is_refused_by_name():
    bank = inlay.attach(make("llama"))
    made = {
        "a": inlay.LoRA(r=2), "b": inlay.LoRA(r=2), "wide": inlay.LoRA(r=4), "ia3": inlay.IA3(),
        "dora": inlay.DoRA(r=2), "prefix": inlay.PrefixTuning(2),
        "parts": [inlay.LoRA(r=2), inlay.BitFit(add_bias=True)],
    }  # fmt: skip
    for name, method in made.items():
        bank.add(name, method, seed=1)
    for words, (weights, settings) in REFUSED.items():
        with pytest.raises(UsageError) as caught:
            bank.combine("new", weights, **settings)
        assert words in str(caught.value) and caught.value.remedy
    assert bank.adapters.keys() == made.keys()


# ---- the command


@pytest.fixture
def folders(base_folder, tmp_path):
    from inlay.bases.load import load_base

    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    for name, method in {"a": inlay.LoRA(r=2), "b": inlay.LoRA(r=2), "ia3": inlay.IA3()}.items():
        bank.add(name, method, seed=len(name))
        shaken(bank)
        notes = {"template": {"kind": "text", "text": "{text}"}} if name == "none" else {}
        bank.save(name, tmp_path / name, notes=notes)
    return tmp_path


def call(*words):
    return CliRunner().invoke(app, ["combine", *map(str, words)])


def test_the_command_writes_an_adapter_and_says_how_far_it_is(base_folder, folders):
    given = ["--base", base_folder, "--adapter", folders / "a", "--adapter", folders / "b"]
    done = call(*given, "--out", folders / "cat", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["rank"] == 4 and told["weights"] == [0.5, 0.5]
    assert told["max_difference"] < 1e-5 and not told["template"]
    done = call(*given, "--weight", 1, "--weight", -0.5, "--how", "ties", "--density", 0.5, "--out", folders / "ties")
    assert done.exit_code == 0 and "ties, rank 2" in done.stdout and "%" in done.stdout
    assert sorted(path.name for path in (folders / "ties").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "inlay.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--adapter", "ia3"], "IA³"),
        (["--adapter", "a"], "given twice"),
        (["--weight", "1"], "2 adapters and 1 weights"),
        (["--weight", "much"], "Give a number"),
        (["--how", "ties"], "needs a density"),
        (["--how", "sum"], "not known"),
        (["--density", "2"], "density"),
        (["--out", "a"], "not empty"),
    ],
)
def test_the_command_refuses_in_one_line(base_folder, folders, more, words, monkeypatch):
    monkeypatch.chdir(folders)
    given = ["--base", base_folder, "--adapter", "a", "--adapter", "b", *([] if "--out" in more else ["--out", "new"])]
    done = call(*given, *more)
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.output
    assert not (folders / "new").exists() and not [path for path in folders.iterdir() if path.name.startswith(".")]
