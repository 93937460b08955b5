"""Makes fusion_*.safetensors, setups_*.safetensors and written_setups_*.safetensors: AdapterHub's AdapterFusion.

It runs in the environment that make_adapterhub.py describes; bases and token ids are those of adapterhub_more:

    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_fusion.py
    PYTHONPATH=tests python -m adapterhub /tmp/written
    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_fusion.py /tmp/written

A file fusion_ holds the weights of the adapters and of their fusion, the logits, and under "grad/" the gradients of the
fusion's own for a language model's loss with the penalty of its values; computed in float64 and kept as float32.

A file setups_ holds folders that AdapterHub saved, adapters and their fusion: the tensors of each folder under its
name as float16, which they are exactly, the files of settings in the metadata, and the logits. The second line above,
where Inlay is installed, opens each and saves it in AdapterHub's format; the third opens those in AdapterHub, and keeps
what Inlay wrote with the logits.
"""

import json
import sys
import tempfile
from pathlib import Path

import adapters
import torch
from adapters.composition import Fuse
from make_adapterhub import BASES, scrambled
from make_adapterhub_files import model_of
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SEQ, DOUBLE = adapters.SeqBnConfig, adapters.DoubleSeqBnConfig
DYNAMIC, STATIC = adapters.DynamicAdapterFusionConfig, adapters.StaticAdapterFusionConfig
KINDS = {
    "dynamic": (SEQ(reduction_factor=4), SEQ(reduction_factor=8), DYNAMIC()),
    "static": (DOUBLE(reduction_factor=4), DOUBLE(reduction_factor=8), STATIC()),
    "whole": (SEQ(reduction_factor=4), SEQ(reduction_factor=8), DYNAMIC(residual_before=True, query_before_ln=True)),
}


def made(model, kind, first, second, config, ids):
    names = [f"{kind}_a", f"{kind}_b"]
    for name, own in zip(names, (first, second), strict=True):
        model.add_adapter(name, config=own)
    model.add_adapter_fusion(Fuse(*names), config)
    model.double()
    model.train_adapter_fusion(Fuse(*names))
    model.eval()
    fused = ",".join(names)
    held = {key: p for key, p in model.named_parameters() if {*names, fused} & set(key.split("."))}
    with torch.no_grad():
        for parameter in held.values():
            wide = torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3)
            parameter.copy_((parameter + wide).float())
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    penalty = model.get_fusion_regularization_loss()
    own = {key: p for key, p in held.items() if fused in key.split(".")}
    grads = torch.autograd.grad(loss + (0 if penalty is None else penalty), list(own.values()))
    found = {key: value.detach() for key, value in held.items()} | {"logits": logits.detach()}
    model.set_active_adapters(None)
    return found | {f"grad/{key}": grad for key, grad in zip(own, grads, strict=True)}


BARE = DYNAMIC(key=False, query=False, value=False, regularization=False, value_initialized=False)
FIELDS = DYNAMIC(
    key=False, regularization=False, residual_before=True, query_before_ln=True, value_before_softmax=False,
    value_initialized=False, dropout_prob=0.25,
)  # fmt: skip
UPPER = DOUBLE(reduction_factor=8, leave_out=[0])
SETUPS = {
    "static": (DOUBLE(reduction_factor=4), DOUBLE(reduction_factor=8), STATIC()),
    "dynamic": (SEQ(reduction_factor=4), SEQ(reduction_factor=8), DYNAMIC()),
    "fields": (SEQ(reduction_factor={"default": 4, "1": 8}), SEQ(reduction_factor=8, ln_before=True), FIELDS),
    "bare": (UPPER, DOUBLE(reduction_factor=8, scaling="learned", leave_out=[0]), BARE),
}
SETUP_BASES = ("llama", "gpt2", "bert", "qwen2")
FUSE = Fuse("first", "second")


def logits(model, ids):
    model.set_active_adapters(FUSE)
    model.double().eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def kept(folder, kind, read, ending):
    """The tensors of all folders inside of `folder`, by the folder and their keys; and its files of settings. The
    base's own head, which AdapterHub saves beside each adapter, is left out."""
    files = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*.json")}
    files = {name: own for name, own in files.items() if Path(name).name not in ("inlay.json", "head_config.json")}
    found = {
        f"{kind}/{path.parent.name}/{key}": value.half().contiguous()
        for path in sorted(folder.rglob(f"*.{ending}")) if "head" not in path.name for key, value in read(path).items()
    }  # fmt: skip
    return found, json.dumps(files, sort_keys=True)


def theirs(base):
    tensors, configs = {}, {}
    for kind, (first, second, config) in SETUPS.items():
        torch.manual_seed(len(tensors))
        model, ids, _ = model_of(base)
        for name, own in zip(FUSE, (first, second), strict=True):
            model.add_adapter(name, config=own)
        model.add_adapter_fusion(FUSE, config)
        own = [p for key, p in model.named_parameters() if {*FUSE, FUSE.name} & set(key.split("."))]
        scrambled(own)
        for parameter in own:
            parameter.data = parameter.data.half().double()
        with tempfile.TemporaryDirectory() as folder:
            model.float().save_adapter_setup(folder, FUSE)
            found, configs[kind] = kept(Path(folder), kind, torch.load, "bin")  # noqa: TID251
        tensors |= {**found, f"{kind}/logits": logits(model, ids)}
    save_file(tensors, HERE / f"setups_{base}.safetensors", metadata=configs)


def ours(base, written):
    tensors, configs = {}, {}
    for folder in sorted((written / "setups" / base).iterdir()):
        model, ids, _ = model_of(base)
        found, configs[folder.name] = kept(folder, folder.name, load_file, "safetensors")
        model.load_adapter_setup(str(folder), use_safetensors=True)
        held = {key for key in model.state_dict() if {*FUSE, FUSE.name} & set(key.split("."))}
        missing = held - {key.split("/", 2)[2] for key in found}
        assert all(folder.name == "bare" and ".dense." in key for key in missing), (folder, missing)
        tensors |= {**found, f"{folder.name}/logits": logits(model, ids)}
    save_file(tensors, HERE / f"written_setups_{base}.safetensors", metadata=configs)


def numbers():
    bases = load_file(HERE / "adapterhub_more.safetensors")
    for name in ("llama", "gpt2", "bert"):
        model = BASES[name]().double().eval()
        start = f"{name}/base/"
        model.load_state_dict({k.removeprefix(start): v for k, v in bases.items() if k.startswith(start)})
        model.tie_weights()
        adapters.init(model)
        torch.manual_seed(3)
        for kind, configs in KINDS.items():
            tensors = made(model, kind, *configs, bases[f"{name}/ids"])
            save_file(
                {k: v.float().contiguous() for k, v in tensors.items()}, HERE / f"fusion_{name}_{kind}.safetensors"
            )


def main():
    torch.set_default_dtype(torch.float64)
    if len(sys.argv) == 1:
        numbers()
    for base in SETUP_BASES:
        if len(sys.argv) == 1:
            theirs(base)
        else:
            ours(base, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
