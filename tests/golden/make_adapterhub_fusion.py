"""Makes fusion_*.safetensors, one for each base and kind: what AdapterHub's AdapterFusion gives, and its gradients.

It runs in the environment that make_adapterhub.py describes; bases and token ids are those of adapterhub_more:

    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_fusion.py

A file holds the weights of the adapters and of their fusion, the logits, and under "grad/" the gradients of the
fusion's own for a language model's loss with the penalty of its values; computed in float64 and kept as float32.
"""

from pathlib import Path

import adapters
import torch
from adapters.composition import Fuse
from make_adapterhub import BASES
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


def main():
    torch.set_default_dtype(torch.float64)
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


if __name__ == "__main__":
    main()
