"""Adapters beside a quantized base: its own modules are called, its weights never read."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils
from typer.testing import CliRunner

import inlay
from inlay.bases.load import load_base
from inlay.cli.app import app
from inlay.errors import InlayError, UsageError
from inlay.runs.settings import differences
from zoo import make

IDS = torch.randint(3, 48, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + "question,answer\n" * 12)
    return file


def test_an_int8_base_carries_adapters():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make("llama", dtype=torch.float32)
    plain = model(input_ids=IDS).logits
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "head" not in name
    )
    before = model(input_ids=IDS).logits
    assert not torch.equal(before, plain)
    _mixes(model, before)


def test_a_4bit_base_carries_adapters(base_folder):
    model = load_base(str(base_folder), "float32", "cpu", "4bit").model
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    before = model(input_ids=IDS).logits
    assert not torch.equal(before, load_base(str(base_folder), "float32", "cpu").model(input_ids=IDS).logits)
    _mixes(model, before)


def _mixes(model, before):
    """Rows through two adapters and none, forward and backward, beside `before`, the plain model's logits."""
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=1)
    bank.add("b", inlay.PrefixTuning(num_virtual_tokens=2), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with bank.route(["a", None, "b"]):
        mixed = model(input_ids=IDS).logits
    torch.testing.assert_close(mixed[1], before[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], before[0], atol=1e-3) and not torch.allclose(mixed[2], before[2], atol=1e-3)
    mixed.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())


def test_lora_on_a_4bit_base_equals_the_reference(base_folder, tmp_path):
    ours = load_base(str(base_folder), "float32", "cpu", "4bit").model
    bank = inlay.attach(ours)
    adapter = bank.add("a", inlay.LoRA(r=4), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    bank.save("a", tmp_path / "a")
    with bank.route(["a"] * 3):
        logits = ours(input_ids=IDS).logits
    logits.square().sum().backward()

    targets = [path.rpartition(".")[2] for path in adapter.sites]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(set(targets)))
    theirs = get_peft_model(load_base(str(base_folder), "float32", "cpu", "4bit").model, config)
    with torch.no_grad():
        for path in adapter.sites:
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(adapter.params[path]["A"])
            layer.lora_B["default"].weight.copy_(adapter.params[path]["B"])
    expected = theirs(input_ids=IDS).logits
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for path in adapter.sites:
        layer = theirs.get_submodule(f"base_model.model.{path}")
        for key, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            grad = adapter.params[path][key].grad
            assert grad is not None
            torch.testing.assert_close(grad, part["default"].weight.grad, rtol=1e-3, atol=1e-3 * grad.abs().max())


def test_loftq_begins_as_what_quantization_took(base_folder, tmp_path):
    whole = load_base(str(base_folder), "float32", "cpu").model
    base = load_base(str(base_folder), "float32", "cpu", "4bit")
    bank = inlay.attach(base.model)
    plain = inlay.attach(load_base(str(base_folder), "float32", "cpu", "4bit").model)
    for method in (inlay.LoRA(r=8, alpha=8, init="loftq"), inlay.LoRA(r=8, alpha=24, init="loftq")):
        adapter = bank.add("a", method, seed=1)
        for path, site in adapter.parts[0].sites.items():
            weight = whole.get_submodule(path).weight.detach()
            found = loftq_utils._low_rank_decomposition(weight - site.weight(), reduced_rank=8)
            a, b = (adapter.params[path][name].detach() for name in ("A", "B"))
            torch.testing.assert_close(method.scale(site) * b @ a, found["L"] @ found["R"], rtol=1e-4, atol=1e-5)
            if method.alpha == 8:  # HF PEFT's own numbers, which know no scale, up to the signs of singular vectors
                torch.testing.assert_close(a.abs(), found["R"].abs(), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(b.abs(), found["L"].abs(), rtol=1e-3, atol=1e-4)
        with bank.route(["a"] * 3), torch.no_grad():
            near = bank.model(input_ids=IDS).logits
        with torch.no_grad():
            exact, far = whole(input_ids=IDS).logits, plain.model(input_ids=IDS).logits
        assert (near - exact).norm() < 0.8 * (far - exact).norm()
        bank.remove("a")
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        bank.add("b", inlay.LoRA(init="loftq", loftq_weights=str(tmp_path)))
    with pytest.raises(UsageError, match=r"q_proj is not quantized. Open the base with --quantize 4bit"):
        inlay.attach(whole).add("b", inlay.LoRA(init="loftq"))


def test_training_on_a_4bit_base_and_using_what_came_of_it(base_folder, rows, tmp_path):
    def call(*words):
        done = CliRunner().invoke(app, [*map(str, words), "--base", str(base_folder), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    out = tmp_path / "run"
    trained = call("train", "--data", rows, "--out", out, "--quantize", "4bit", "--batch-size", 4, "--epochs", 4)
    assert trained["tokens_per_second"] > 0
    assert "--quantize 4bit" in (out / "adapter/README.md").read_text()
    for quantize in ([], ["--quantize", "4bit"]):  # on the whole base too
        scores = call("eval", "--data", rows, "--adapter", out / "adapter", *quantize)
        assert scores["adapters"][str(out / "adapter")]["loss"] < scores["base"]["loss"]
    told = json.loads((out / "run.json").read_text())["config"]
    assert differences(told, {**told, "quantize": None}) == ["quantize was '4bit', is None"]
    assert call("merge", "--adapter", out / "adapter", "--out", tmp_path / "merged")["max_difference"] < 1e-3


def test_what_cannot_be_quantized(base_folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="quantization '3bit' is not known"):
        load_base(str(base_folder), "float32", "cpu", "3bit")
    with pytest.raises(UsageError, match="float64"):
        load_base(str(base_folder), "float64", "cpu", "4bit")
    base = load_base(str(base_folder), "float32", "cpu", "4bit")
    base.model.save_pretrained(tmp_path / "small")
    with pytest.raises(UsageError, match="quantized already"):
        load_base(str(tmp_path / "small"), "float32", "cpu", "4bit")
    bank = inlay.attach(base.model)
    bank.add("a", inlay.LoRA(r=2))
    with pytest.raises(UsageError, match="quantized"):
        bank.merge("a")
    monkeypatch.setattr("inlay.bases.extras.find_spec", lambda name: None)
    with pytest.raises(InlayError, match=r"4bit needs bitsandbytes, which is not installed. pip install 'bitsandbytes"):
        load_base(str(base_folder), "float32", "cpu", "4bit")
