"""AdapterHub's numbers on tiny models, and bases and adapters that hold its weights; golden/make_adapterhub_more.py and
golden/make_adapterhub_files.py made them.

`PYTHONPATH=tests python -m adapterhub FOLDER` opens the folders that AdapterHub saved and writes them again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file

import inlay
import test_bottleneck
from inlay.errors import InlayError

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "adapterhub_more.safetensors")
FAMILIES = ("llama", "gpt2", "bert")
STEPS, RATE = 4, 0.1
BOTTLENECK = {"down": "down.0.weight", "down_bias": "down.0.bias", "up": "up.weight", "up_bias": "up.bias"}


ENCODER = test_bottleneck.SMALL
DECODER = ENCODER | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=4, query_pre_attn_scalar=4)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**ENCODER)),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**ENCODER, embedding_size=16)),
}
"""Bases whose weights the files of their adapters hold."""


def base_of(name):
    if name not in MODELS:
        return test_bottleneck.base_of(name, GOLDEN)
    model, stored = MODELS[name]().double().eval(), load_file(FOLDER / f"files_{name}.safetensors")
    found = {key.removeprefix("base/"): value.double() for key, value in stored.items() if key.startswith("base/")}
    lost = model.load_state_dict(found, strict=False).missing_keys
    assert all("position_ids" in key or "token_type_ids" in key for key in lost), lost
    model.tie_weights()
    return model


def reference(name, kind, key):
    return GOLDEN[f"{name}/{kind}/{key}"]


def copy(parameter, value):
    with torch.no_grad():
        assert parameter.shape == value.shape
        parameter.copy_(value)


def fill_bottlenecks(part, base, name, kind):
    """AdapterHub's weights in a part of parallel adapters."""
    for path, site in part.sites.items():
        block = next(b for b in base.blocks if path.startswith(b + "."))
        if name == "bert":
            place = "output." if site.part == "mlp" else "attention.output."
        else:
            place = "output_" if site.part == "mlp" else "attention_"
        for own, theirs in BOTTLENECK.items():
            key = f"{block}.{place}adapters.adapters.{kind}.adapter_{theirs}"
            if name == "bert":
                key = f"{block}.{place}adapters.{kind}.adapter_{theirs}"
            copy(part.params[path][own], reference(name, kind, key))
        if "scale" in part.params[path]:
            key = key.replace("adapter_up.bias", "scaling")
            copy(part.params[path]["scale"], reference(name, kind, key))


def curve(bank, adapter, inputs):
    """The logits, the losses of a few steps of SGD as the reference made them, and the logits behind those."""
    ids, parameters = inputs["input_ids"], list(bank.parameters(adapter))
    first, losses = None, []
    for _ in range(STEPS):
        out = bank.model(**inputs).logits
        first = out.detach() if first is None else first
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(RATE * grad)
        losses.append(loss.detach())
    return first, torch.stack(losses), bank.model(**inputs).logits.detach()


def same_curve(bank, adapter, name, kind, inputs, bound=1e-9):
    found = curve(bank, adapter, inputs)
    for ours, key in zip(found, ("logits", "losses", "learned"), strict=True):
        torch.testing.assert_close(ours, reference(name, kind, key), rtol=0, atol=bound)


def inputs_of(name):
    ids = GOLDEN[f"{name}/ids"] if name not in MODELS else load_file(FOLDER / f"files_{name}.safetensors")["ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---- folders


MENDED = ("noreft", "direft")
"""Kinds whose files do not say which of the two they are."""


class Saved:
    """One adapter of a golden file, as AdapterHub or Inlay saved it: config, tensors, and AdapterHub's logits."""

    def __init__(self, file, kind):
        self.base = file.partition("_")[2].partition("_")[0]
        with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
            self.config = json.loads(opened.metadata()[kind])
            names = [key for key in opened.keys() if key.startswith(f"{kind}/")]  # noqa: SIM118
            found = {key: opened.get_tensor(key) for key in names}
        self.logits = found.pop(f"{kind}/logits").double()
        self.tensors = {key.removeprefix(f"{kind}/"): value for key, value in found.items()}

    @property
    def ids(self):
        return GOLDEN[f"{self.base}/ids"]

    def say_subtraction(self, kind):
        """What AdapterHub leaves out of ReFT's config."""
        if kind in MENDED:
            self.config["config"]["subtract_projection"] = kind == "noreft"

    def to(self, folder):
        """The folder as AdapterHub leaves it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        torch.save(self.tensors, folder / "pytorch_adapter.bin")
        return folder


class SavedSetup:
    """A fusion of a golden file with its adapters, as AdapterHub or Inlay saved them: `files` are the settings by their
    paths, `tensors` those of each folder, and `logits` AdapterHub's."""

    def __init__(self, file, kind):
        self.base = file.rpartition("setups_")[2]
        with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
            self.files = json.loads(opened.metadata()[kind])
            names = [key for key in opened.keys() if key.startswith(f"{kind}/")]  # noqa: SIM118
            found = {key.removeprefix(f"{kind}/"): opened.get_tensor(key).float() for key in names}
        self.logits = found.pop("logits").double()
        self.tensors = {}
        for key, value in found.items():
            folder, _, key = key.partition("/")
            self.tensors.setdefault(folder, {})[key] = value

    def to(self, folder):
        """The folder as AdapterHub leaves it."""
        for name, tensors in self.tensors.items():
            (folder / name).mkdir(parents=True)
            file = "pytorch_model_adapter_fusion.bin" if "," in name else "pytorch_adapter.bin"
            torch.save(tensors, folder / name / file)
        for path, own in self.files.items():
            (folder / path).write_text(json.dumps(own))
        return folder


def kinds_of(file):
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as opened:
        return list(opened.metadata())


THEIRS = sorted((file.stem, kind) for file in FOLDER.glob("files_*.safetensors") for kind in kinds_of(file.stem))
"""Golden file and kind of all that AdapterHub saved."""
WRITTEN = sorted(
    (file.stem, kind)
    for file in FOLDER.glob("written_*.safetensors") if "setups" not in file.stem for kind in kinds_of(file.stem)
)  # fmt: skip
"""Those of all that Inlay wrote, with the logits that AdapterHub had with it."""

SETUPS = sorted((file.stem, kind) for file in FOLDER.glob("setups_*.safetensors") for kind in kinds_of(file.stem))
"""Golden file and kind of all fusions that AdapterHub saved with their adapters."""

SCALED = ("llama", "qwen2")
"""Bases whose MLP ends in a layer that reads a product."""


def scaling_inputs(base):
    """IA³ that scales what each MLP's last layer reads, as AdapterHub's scales what another gives."""
    bank = inlay.attach(base_of(base))
    adapter = bank.add("a", inlay.IA3(), seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
            parameter.copy_(parameter.float())
    return bank


def write_all(target):
    for file, kind in THEIRS:
        saved = Saved(file, kind)
        saved.say_subtraction(kind)
        bank = inlay.attach(base_of(saved.base))
        try:
            bank.load("ours", saved.to(target / "theirs"))
            bank.save("ours", target / file.removeprefix("files_") / kind, format="adapterhub")
        except InlayError as error:
            print(f"{file} {kind}: {error}")
    for file, kind in SETUPS:
        saved = SavedSetup(file, kind)
        bank = inlay.attach(base_of(saved.base))
        bank.load("ours", saved.to(target / "theirs" / file / kind))
        bank.save("ours", target / "setups" / saved.base / kind, format="adapterhub")
    for base in SCALED:
        scaling_inputs(base).save("a", target / "inputs" / base / "ia3", format="adapterhub")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
