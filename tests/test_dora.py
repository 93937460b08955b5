"""DoRA against HF PEFT 0.21.2: fresh starts, logits, gradients, a training run, checkpoints both ways, merges."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers as tf

import inlay
from curves import adamw_losses
from inlay.bases.quantize import keep_layout
from inlay.errors import FormatError
from inlay.methods.dora import row_norms
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_training import examples, same
from zoo import make

IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 0, "atol": 1e-9}
HALF = {"rtol": 0.02, "atol": 0.02}


def config(**more):
    return peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, **more)


THEIRS = {
    "llama": config(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
    "opt": config(target_modules=["k_proj", "fc1", "embed_tokens"]),  # non-zero biases, and a table
    "gpt2": config(target_modules=["c_attn", "wte"], use_rslora=True, fan_in_fan_out=True),
    "bert": config(target_modules=r".*layer\.1\..*(query|value)"),
    "gemma3": config(target_modules=["embed_tokens", "v_proj"]),  # a table that is scaled when it is looked up
}


def randomise(parameters, by=0.2):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def reference(name, dtype=torch.float64):
    model = peft.get_peft_model(make(name, dtype=dtype), copy.deepcopy(THEIRS[name])).eval()
    randomise(trained(model))
    return model


@pytest.mark.parametrize("name", list(THEIRS))
def test_checkpoints_go_both_ways(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = theirs(input_ids=IDS).logits
    bank = inlay.attach(make(name))
    plain = bank.model(input_ids=IDS).logits
    adapter = bank.load("a", tmp_path / "theirs")
    assert isinstance(adapter.method, inlay.DoRA)
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, **EXACT)
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, ours, **EXACT)
    again = inlay.attach(make(name))
    again.load("a", tmp_path / "ours")
    again.set("a")
    torch.testing.assert_close(again.model(input_ids=IDS).logits, ours, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(THEIRS))
def test_a_merge_gives_the_weights_of_the_reference(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    bank = inlay.attach(make(name))
    sites = bank.load("a", tmp_path / "theirs").sites
    bank.set("a")
    unmerged = bank.model(input_ids=IDS).logits
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, unmerged, **EXACT)
    expected, before = theirs.merge_and_unload(), make(name)
    for path in sites:  # the reference also changes a head that is tied to an adapted table, and so its logits
        merged, plain = (model.get_submodule(path).weight for model in (bank.model, before))
        torch.testing.assert_close(merged, expected.get_submodule(path).weight, **EXACT)
        assert not torch.allclose(merged, plain, atol=1e-3)


@pytest.mark.parametrize("name", list(THEIRS))
def test_gradients_and_a_run_are_those_of_the_reference(name, tmp_path):
    """Same start, same data, same optimizer: the same losses step by step, and the same parameters behind them."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    bank = inlay.attach(make(name))
    adapter = bank.load("a", tmp_path)
    bank.set("a")
    pairs = ((bank.model, list(adapter.parameters())), (theirs, trained(theirs)))
    losses = [adamw_losses(model, parameters, IDS, lr=1e-2, steps=8) for model, parameters in pairs]
    assert losses[0][0] - losses[0][-1] > 0.01
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-7)
    theirs.eval()
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_starts_as_the_reference(name, dtype):
    bank = inlay.attach(make(name, dtype=dtype))
    plain = bank.model(input_ids=IDS).logits
    targets = sorted(THEIRS[name].target_modules)
    adapter = bank.add("a", inlay.DoRA(r=4, targets=targets), seed=1)
    bank.set("a")
    assert torch.equal(bank.model(input_ids=IDS).logits, plain)  # m / |W| is 1 to the last bit
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    theirs = peft.get_peft_model(
        make(name, dtype=dtype), peft.LoraConfig(r=4, target_modules=targets, use_dora=True, **fan)
    )
    found = {key: p for key, p in theirs.named_parameters() if "magnitude" in key}
    assert len(found) == len(adapter.params)
    for path, own in adapter.params.items():
        value = next(p for key, p in found.items() if f".{path}." in key)
        rtol = 0.005 if dtype == torch.bfloat16 else 1e-5  # the reference rounds it to the base's dtype
        torch.testing.assert_close(own["m"].detach(), value.detach().to(own["m"].dtype), rtol=rtol, atol=0)


def test_row_norms_need_no_product():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    a, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((8, 200), (300, 8)))
    for by in (0.0, 0.01, 1.0, 30.0):
        expected = (w + 0.5 * by * b @ a).norm(dim=1)
        torch.testing.assert_close(row_norms(w, a, b * by, 0.5), expected, rtol=1e-13, atol=0)
        single = row_norms(w.float(), a.float(), b.float() * by, 0.5)
        torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=0)
        assert row_norms(w.bfloat16(), a.bfloat16(), (b * by).bfloat16(), 0.5).dtype == torch.float32


def test_half_precision_agrees_within_its_rounding(tmp_path):
    theirs = reference("opt", torch.bfloat16)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    bank = inlay.attach(make("opt", dtype=torch.bfloat16))
    bank.load("a", tmp_path)
    exact = inlay.attach(make("opt", dtype=torch.bfloat16).double())
    exact.load("a", tmp_path)
    for each in (bank, exact):
        each.set("a")
    ours, right = bank.model(input_ids=IDS).logits, exact.model(input_ids=IDS).logits
    theirs_off = (theirs(input_ids=IDS).logits - right).norm() / right.norm()
    ours_off = (ours - right).norm() / right.norm()
    assert ours.dtype == torch.bfloat16 and float(ours_off) < 2 * float(theirs_off) < 0.05


def test_dropout_falls_on_the_low_rank_branch_alone():
    bank = inlay.attach(make("opt"))
    bank.add("a", inlay.DoRA(r=4, targets=["fc1"], dropout=0.5), seed=1)
    with torch.no_grad():
        for own in bank.adapters["a"].params.values():
            own["m"].mul_(1.5)
    from inlay.batch.noise import Noise

    def logits():
        with bank.route(["a", "a"], noise=Noise([0, 0], [0, 1])):
            return bank.model(input_ids=IDS).logits

    bank.set("a")
    torch.testing.assert_close(logits(), bank.model(input_ids=IDS).logits, **EXACT)  # B is 0: nothing else is dropped
    randomise(bank.parameters())
    assert (logits() - bank.model(input_ids=IDS).logits).abs().max() > 1e-3


PLANS = [
    Plan("dora", inlay.DoRA(r=2, dropout=0.1), lr=1e-2, batch_size=4, steps=6, seed=1),
    Plan("another", inlay.DoRA(r=2), lr=3e-3, batch_size=3, steps=6, seed=2),
    Plan("vera", inlay.VeRA(r=8, dropout=0.1), lr=3e-2, batch_size=4, steps=6, seed=3),
    Plan("bitfit", inlay.BitFit(add_bias=True), lr=3e-2, batch_size=4, steps=6, seed=4),
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_learners_together_equal_their_solo_runs(name):
    bank = inlay.attach(make(name))
    for _ in train_steps(bank, add_learners(bank, PLANS, 24), examples(), TokenBudget(4096)):
        pass
    for plan in PLANS:
        solo = inlay.attach(make(name))
        start = {key: p.detach().clone() for key, p in enumerate(solo.add("x", plan.method, seed=1).parameters())}
        solo.remove("x")
        for _ in train_steps(solo, add_learners(solo, [plan], 24), examples(), TokenBudget(4096)):
            pass
        same(bank, solo, plan.name, 1e-9)
        moved = [not torch.equal(p, start[key]) for key, p in enumerate(solo.parameters(plan.name))]
        assert any(moved)


def test_a_base_of_fewer_bits_sees_small_changes_of_m():
    """They are lost where m is rounded as the base's numbers are; rows that wait for their next token see them too."""
    bank = inlay.attach(make("llama", dtype=torch.bfloat16))
    for number in range(4):
        bank.add(str(number), inlay.DoRA(r=2, targets=["down_proj"]), seed=number)
    with torch.no_grad():
        for own in bank.adapters["1"].params.values():
            own["m"].mul_(1.003)
    part, cache = bank.adapters["1"].parts[0], {}
    for path in part.sites:
        torch.testing.assert_close(part.form(path, torch.bfloat16, cache).out_scale.detach(), torch.full((16,), 1.003))
    ids = IDS[:1].expand(4, -1)
    with torch.no_grad(), bank.route(["0", "1", "2", "3"]):
        out = bank.model(input_ids=ids, use_cache=True)
        after = bank.model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.dtype == after.logits.dtype == torch.bfloat16
    for logits in (out.logits, after.logits):
        assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])


def test_a_4bit_base_is_read_as_what_it_holds(tmp_path):
    settings = dict(vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**settings, pad_token_id=0)).save_pretrained(tmp_path / "base")
    quantization = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def base():
        model = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
        )
        keep_layout(model)
        return model

    theirs = peft.get_peft_model(base(), config(target_modules=["q_proj", "down_proj"])).eval()
    randomise(trained(theirs), 0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    bank = inlay.attach(base())
    plain = bank.model(input_ids=IDS).logits
    bank.add("fresh", inlay.DoRA(r=4), seed=1)
    bank.load("a", tmp_path / "theirs")
    bank.set("fresh")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, plain, rtol=1e-4, atol=1e-4)
    bank.set("a")
    ours = bank.model(input_ids=IDS).logits
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)


def test_a_plain_lora_stays_one_and_other_switches_are_refused(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.DoRA(r=4, targets=["q_proj"]), seed=1)
    bank.add("b", inlay.LoRA(r=4, targets=["q_proj"]), seed=1)
    for name in ("a", "b"):
        bank.save(name, tmp_path / name)
        assert type(inlay.attach(make("llama")).load("x", tmp_path / name).method) is type(bank.adapters[name].method)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_bias": True}))
    with pytest.raises(FormatError, match="lora_bias"):
        inlay.attach(make("llama")).load("x", tmp_path / "a")
