"""Merged models: whole or not there at all, in the dtype that was asked for, on disks of every kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

import inlay
from inlay.bases.folders import weights_stored
from inlay.bases.load import load_base
from inlay.cli.app import app
from inlay.errors import FormatError, InlayError, UsageError
from inlay.merging.merge import merge_to_folder


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A LoRA adapter that moves the base, in a run's folder."""
    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    bank.add("a", inlay.LoRA(r=2, targets="all-linear"))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    bank.save("a", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run" / "adapter"


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(kind, *parts, base, adapter, out, dtype="float32"):
    with pytest.raises(kind) as caught:
        merge_to_folder(str(base), str(adapter), str(out), dtype)
    assert "\n" not in str(caught.value) and caught.value.remedy
    for part in parts:
        assert str(part) in str(caught.value)


def test_a_run_is_merged_and_nothing_is_printed(base_folder, adapter, tmp_path, capfd):
    told = merge_to_folder(str(base_folder), str(adapter.parent), str(tmp_path / "deep" / "merged"))
    assert capfd.readouterr() == ("", "")
    assert told["max_difference"] < 1e-5 < 0.1 < told["largest_logit"] and told["dtype"] == "float32"
    assert left_in(tmp_path / "deep") == ["merged"]
    ids = torch.arange(1, 9)[None]
    bank = inlay.attach(load_base(str(base_folder), "float32", "cpu").model)
    bank.load("a", adapter)
    plain = bank.model(ids).logits
    bank.set("a")
    merged = load_base(str(tmp_path / "deep" / "merged"), "float32", "cpu").model(ids).logits
    torch.testing.assert_close(merged, bank.model(ids).logits)
    assert (merged - plain).abs().max() > 0.01


@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
def test_auto_keeps_the_dtype_of_the_files(own, base_folder, adapter, tmp_path):
    base = tmp_path / own
    shutil.copytree(base_folder, base)
    values = {key: value.to(getattr(torch, own)) for key, value in load_file(base / "model.safetensors").items()}
    save_file(values, base / "model.safetensors", {"format": "pt"})
    told = merge_to_folder(str(base), str(adapter), str(tmp_path / "merged"), "auto")
    assert told["dtype"] == own == weights_stored(tmp_path / "merged")[1]


def test_an_adapter_of_peft(base_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_base(str(base_folder), "float32", "cpu").model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "theirs")
    told = merge_to_folder(str(base_folder), str(tmp_path / "theirs"), str(tmp_path / "merged"))
    ids = torch.arange(1, 9)[None]
    merged = load_base(str(tmp_path / "merged"), "float32", "cpu").model(ids).logits
    torch.testing.assert_close(merged, wrapped(ids).logits, atol=1e-5, rtol=1e-5)
    assert told["max_difference"] < 1e-5


def test_places_where_no_folder_can_be(base_folder, adapter, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    same = dict(base=base_folder, adapter=adapter)
    refused(UsageError, file, "is a file", out=file, **same)
    refused(UsageError, file, "is a file", out=file / "below" / "it", **same)
    refused(UsageError, "exists and is not empty", out=tmp_path, **same)
    assert file.read_text() == "mine" and left_in(tmp_path) == ["file", "run"]
    (tmp_path / "empty").mkdir()
    merge_to_folder(str(base_folder), str(adapter), str(tmp_path / "empty"))
    assert "model.safetensors" in left_in(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(base_folder, adapter, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    refused(UsageError, "may not be written to", base=base_folder, adapter=adapter, out=tmp_path / "theirs" / "m")


def test_room_is_asked_for_before_any_work(base_folder, adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 << 20))
    monkeypatch.setattr("inlay.merging.merge.load_base", None)  # nothing is loaded
    refused(InlayError, tmp_path, "3 MB left", "needs 64 MB", base=base_folder, adapter=adapter, out=tmp_path / "m")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x: No space left")])
def test_a_disk_that_fills_on_the_way(error, base_folder, adapter, tmp_path, monkeypatch):
    def half_written(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half_written)
    refused(
        InlayError,
        tmp_path,
        "MB left, and the merged model needs",
        base=base_folder,
        adapter=adapter,
        out=tmp_path / "m",
    )
    assert left_in(tmp_path) == ["run"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.parametrize("checked", [True, False])
def test_a_real_disk_of_60_kb(checked, base_folder, adapter, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(disk)], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        if not checked:
            monkeypatch.setattr("inlay.merging.merge._check_room", lambda folder, need: None)
        refused(InlayError, disk, "MB left", base=base_folder, adapter=adapter, out=disk / "merged")
        assert left_in(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_numbers_that_are_none(base_folder, adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    values = load_file(base / "model.safetensors")
    next(iter(values.values())).view(-1)[0] = float("nan")
    save_file(values, base / "model.safetensors", {"format": "pt"})
    refused(FormatError, base, "NaN", base=base, adapter=adapter, out=tmp_path / "m")
    values = load_file(adapter / "adapter_model.safetensors")
    next(iter(values.values())).view(-1)[0] = float("nan")
    save_file(values, adapter / "adapter_model.safetensors", {"format": "pt"})
    refused(InlayError, adapter, base=base_folder, adapter=adapter, out=tmp_path / "m")
    assert left_in(tmp_path) == ["base", "run"]


def test_the_command_says_it_in_one_line(base_folder, adapter, tmp_path):
    given = ["merge", "--base", str(base_folder), "--adapter", str(adapter.parent)]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "m"), "--dtype", "auto", "--json"])
    assert json.loads(done.stdout)["merged"] == str(tmp_path / "m") and not done.stderr
    again = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "m")])
    assert again.exit_code == 2 and again.stderr.count("\n") == 1 and "not empty" in again.stderr
