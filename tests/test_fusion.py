"""AdapterFusion gives AdapterHub's numbers, and lives beside the adapters that it is over; make_adapterhub_fusion.py in
golden/ made the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import inlay
from adapterhub import base_of, inputs_of
from inlay.bases.load import load_base
from inlay.errors import UsageError
from inlay.runs.run import run
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import broken_off, content, reviews, settings  # noqa: F401
from test_training import examples
from zoo import make

FOLDER = Path(__file__).parent / "golden"
EXACT = {"rtol": 0, "atol": 1e-9}
IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))
KINDS = {
    "dynamic": (inlay.Pfeiffer, {}),
    "static": (inlay.Houlsby, {"value": False, "query_before_ln": True}),  # their adapters read what the sublayer gives
    "whole": (inlay.Pfeiffer, {"residual_before": True, "query_before_ln": True}),
}
NAMES = {
    "down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}  # fmt: skip
OWN = {"Q": "query.weight", "q": "query.bias", "K": "key.weight", "k": "key.bias", "V": "value.weight"}


def place_of(base, name, path):
    """Where AdapterHub keeps what stands at a sublayer."""
    block = next(b for b in base.blocks if path.startswith(b + "."))
    mlp = next(site for site in base.sublayers if site.path == path).part == "mlp"
    if name == "bert":
        return f"{block}.output" if mlp else f"{block}.attention.output"
    return f"{block}.output_adapters" if mlp else f"{block}.attention_adapters"


def fused(name, kind):
    """A bank with AdapterHub's adapters and their fusion "f", and the golden file."""
    golden = load_file(FOLDER / f"fusion_{name}_{kind}.safetensors")
    bank = inlay.attach(base_of(name))
    method, settings = KINDS[kind]
    for end, factor in (("a", 4), ("b", 8)):
        adapter = bank.add(f"{kind}_{end}", method(reduction_factor=factor), seed=0)
        for path, params in adapter.params.items():
            inner = "adapters."
            for own, value in params.items():
                key = f"{place_of(bank.base, name, path)}.{inner}{kind}_{end}.{NAMES[own]}"
                with torch.no_grad():
                    value.copy_(golden[key])
    bank.add("f", inlay.Fusion(adapters=[f"{kind}_a", f"{kind}_b"], **settings), seed=0)
    for key, value in own_of(bank, name, kind).items():
        with torch.no_grad():
            value.copy_(golden[key])
    return bank, golden


def own_of(bank, name, kind):
    return {
        f"{place_of(bank.base, name, path)}.adapter_fusion_layer.{kind}_a,{kind}_b.{OWN[own]}": value
        for path, params in bank.adapters["f"].params.items() for own, value in params.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_logits_and_gradients_are_those_of_adapterhub(name, kind):
    bank, golden = fused(name, kind)
    inputs = inputs_of(name)
    ids = inputs["input_ids"]
    bank.set("f")
    logits = bank.model(**inputs).logits
    torch.testing.assert_close(logits, golden["logits"].double(), rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    part = bank.adapters["f"].parts[0]
    penalty = part.method.penalty(part.params)
    (loss + (0 if penalty is None else penalty)).backward()
    for key, value in own_of(bank, name, kind).items():
        torch.testing.assert_close(value.grad, golden[f"grad/{key}"].double(), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for end in "ab" for p in bank.parameters(f"{kind}_{end}"))


def banked():
    bank = inlay.attach(make("llama"))
    for name, factor in (("a", 4), ("b", 8)):
        bank.add(name, inlay.Pfeiffer(reduction_factor=factor), seed=1)
    bank.add("f", inlay.Fusion(adapters=["a", "b"]), seed=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


def test_its_rows_are_right_beside_others_and_where_text_is_written():
    bank = banked()
    rows = [None, "f", "a", ["b", "f"], {"f": 0.5, "a": 1.0}]
    ids = IDS[[0, 1, 2, 0, 1]]
    with bank.route(rows):
        together = bank.model(input_ids=ids).logits
    with bank.stream([(row, 6) for row in rows]):
        packed = bank.model(input_ids=ids.reshape(1, -1)).logits
    for number, row in enumerate(rows):
        with bank.route([row]):
            alone = bank.model(input_ids=ids[number : number + 1]).logits
            written = bank.model.generate(input_ids=ids[number : number + 1], max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(together[number : number + 1], alone, **EXACT)
        torch.testing.assert_close(packed[:, 6 * number : 6 * number + 6], alone, **EXACT)
        with bank.route([row, None]):
            beside = bank.model.generate(input_ids=ids[[number, 0]], max_new_tokens=4, do_sample=False)
        assert torch.equal(beside[:1], written)


def test_a_diverged_adapter_poisons_what_is_over_it_alone():
    bank = banked()
    bank.add("c", inlay.Pfeiffer(reduction_factor=8), seed=4)
    with torch.no_grad():
        next(bank.parameters("a")).fill_(float("nan"))
    with bank.route(["f", "b", "c"]):
        logits = bank.model(input_ids=IDS).logits
    assert logits[0].isnan().any() and not logits[1:].isnan().any()


def test_it_trains_in_the_one_loop_and_the_adapters_stay():
    def trained():
        bank = banked()
        bank.remove("f")
        before = [p.detach().clone() for name in "ab" for p in bank.parameters(name)]
        plans = [Plan("g", inlay.Fusion(adapters=["a", "b"]), lr=3e-2, batch_size=4, steps=24, seed=5)]
        losses = []
        for stepped in train_steps(bank, add_learners(bank, plans, 24), examples(), TokenBudget(64)):
            losses += [learner.loss for learner in stepped]
        assert all(
            torch.equal(*pair) for pair in zip(before, (p for n in "ab" for p in bank.parameters(n)), strict=True)
        )
        return losses, list(bank.parameters("g"))

    losses, parameters = trained()
    again, same = trained()
    assert losses == again and all(torch.equal(*pair) for pair in zip(parameters, same, strict=True))
    assert sum(losses[12:]) < sum(losses[:12])


def test_it_is_saved_over_names_or_folders_and_keeps_its_adapters(tmp_path):
    bank = banked()
    bank.set("f")
    expected = bank.model(input_ids=IDS).logits
    for name in bank.adapters:
        bank.save(name, tmp_path / name)
    bank.set(None)
    with pytest.raises(UsageError, match="'a' is used by 'f'"):
        bank.remove("a")
    bank.remove("f")
    bank.remove("a")
    with pytest.raises(UsageError, match="no adapter is called 'a'"):
        bank.load("f", tmp_path / "f")
    bank.load("a", tmp_path / "a")
    bank.load("f", tmp_path / "f")
    bank.set("f")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    other = inlay.attach(make("llama"))
    folders = [str(tmp_path / name) for name in "ab"]
    other.add("f", inlay.Fusion(adapters=folders), seed=0)
    assert other.adapters.keys() == {*folders, "f"}
    other.save("f", tmp_path / "g")
    third = inlay.attach(make("llama"))
    third.load("f", tmp_path / "g")
    assert third.adapters.keys() == other.adapters.keys()
    with pytest.raises(UsageError, match="no adapter is called 'nobody'"):
        third.add("h", inlay.Fusion(adapters=[str(tmp_path / "f"), "nobody"]))
    assert third.adapters.keys() == other.adapters.keys()  # nothing was loaded


def test_what_it_cannot_be_over_is_refused_by_name():
    bank = banked()
    bank.add("lora", inlay.LoRA(r=2))
    wrong = {
        "not two adapters": inlay.Fusion(adapters=["a"]),
        "no adapter is called 'nobody'": inlay.Fusion(adapters=["a", "nobody"]),
        "which is no sublayer": inlay.Fusion(adapters=["a", "lora"]),
        "acts at model.layers.0.self_attn.o_proj": inlay.Fusion(
            adapters=["a", "b"], targets=["model.layers.0.self_attn.o_proj"]
        ),
    }
    for words, method in wrong.items():
        with pytest.raises(UsageError) as caught:
            bank.add("new", method)
        assert words in str(caught.value) and "new" not in bank.adapters
    with pytest.raises(UsageError, match="cannot be merged"):
        bank.merge("f")


def test_a_run_over_folders_resumes_byte_for_byte(base_folder, reviews, tmp_path):  # noqa: F811
    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    for number, name in enumerate("ab"):
        bank.add(name, inlay.Pfeiffer(reduction_factor=4), seed=number)
        bank.save(name, tmp_path / name)
    given = {"adapters": [str(tmp_path / name) for name in "ab"]}
    more = {"method": "fusion", "set": given, "steps": 4, "eval_every": 4}
    run(settings(base_folder, reviews, tmp_path / "whole", **more), on_message=lambda line: None)
    broken_off(base_folder, reviews, tmp_path / "cut", after=2, **more)
    run(settings(base_folder, reviews, tmp_path / "cut", resume=True, **more), on_message=lambda line: None)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    other = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    other.load("f", tmp_path / "cut")
    assert set(other.adapters) == {*given["adapters"], "f"}
