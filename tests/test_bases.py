"""Bases: how they are named, told apart, loaded and refused; quantized ones carry adapters too."""

from __future__ import annotations

import shutil

import pytest
import torch

import inlay
from inlay.bases.dtypes import pick_dtype
from inlay.bases.fingerprint import fingerprint
from inlay.bases.load import load_base, resolve
from inlay.errors import FormatError, UsageError
from zoo import make


def test_a_fingerprint_survives_the_dtype_and_adapters_and_tells_bases_apart():
    plain = make("llama", dtype=torch.float32)
    name = fingerprint(plain)
    assert fingerprint(make("llama", dtype=torch.bfloat16)) == name
    inlay.attach(plain).add("a", inlay.LoRA())
    assert fingerprint(plain) == name
    assert fingerprint(make("llama", seed=1, dtype=torch.float32)) != name


def test_dtypes():
    assert pick_dtype("float32") is torch.float32 and pick_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(UsageError, match="float32"):
        pick_dtype("half")


def test_a_folder_loads(base_folder):
    base = load_base(str(base_folder), "float32", "cpu")
    assert base.tokenizer.eos_token == "<|im_end|>" and not base.model.training


def test_what_cannot_be_a_base_is_said(base_folder, tmp_path):
    with pytest.raises(UsageError, match="smollm2"):
        resolve("nobody")
    with pytest.raises(UsageError, match=r"config\.json"):
        resolve(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(base_folder, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FormatError, match="broken"):
        load_base(str(broken), "float32", "cpu")
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(FormatError, match="safetensors"):
        load_base(str(broken), "float32", "cpu")
    (broken / "config.json").write_text("[")
    with pytest.raises(FormatError, match="JSON"):
        load_base(str(broken), "float32", "cpu")
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(FormatError, match="GGUF"):
        resolve(str(tmp_path / "x.gguf"))


def test_weights_that_a_base_lacks_are_named(base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base_folder, tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="up_proj"):
        load_base(str(tmp_path / "part"), "float32", "cpu")


def test_an_int8_base_carries_adapters():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = make("llama", dtype=torch.float32)
    ids = torch.randint(3, 48, (3, 5), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).logits
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "head" not in name
    )
    before = model(input_ids=ids).logits
    assert not torch.equal(before, plain)
    bank = inlay.attach(model)
    bank.add("a", inlay.LoRA(r=2), seed=1)
    bank.add("b", inlay.PrefixTuning(num_virtual_tokens=2), seed=1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with bank.route(["a", None, "b"]):
        mixed = model(input_ids=ids).logits
    torch.testing.assert_close(mixed[1], before[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], before[0], atol=1e-3) and not torch.allclose(mixed[2], before[2], atol=1e-3)
    mixed.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bank.parameters())


@pytest.mark.real
def test_the_real_default_base_speaks():
    base = load_base("smollm2", "float32")
    assert base.tokenizer.tokenize("\n\n12  3") == ["ĊĊ", "1", "2", "ĠĠ", "3"]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = base.model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in base.tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
