"""Makes adapterhub_more.safetensors: what AdapterHub's ReFT and parallel adapters give, and how they learn.

It runs in the environment that make_adapterhub.py describes:

    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_more.py

The file holds, for each tiny random model, its state dict and token ids; for each kind of adapter its weights (by
AdapterHub's names, with what its orthogonal projections are), the logits with it, the losses of a few steps of SGD, and
the weights behind them, all float64.
"""

from pathlib import Path

import adapters
import torch
from make_adapterhub import BASES, scrambled
from safetensors.torch import save_file

KINDS = {
    "loreft": adapters.LoReftConfig(r=3, prefix_positions=2, suffix_positions=1, dropout=0.0),
    "loreft_tied": adapters.LoReftConfig(r=2, prefix_positions=4, suffix_positions=4, tied_weights=True, dropout=0.0),
    "noreft": adapters.NoReftConfig(r=2, prefix_positions=1, suffix_positions=2, dropout=0.0, non_linearity="relu"),
    "direft": adapters.DiReftConfig(r=2, prefix_positions=0, suffix_positions=2, dropout=0.0),
    "loreft_layer": adapters.LoReftConfig(r=1, layers=[1], dropout=0.0),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "par_bn_both": adapters.ParBnConfig(reduction_factor=4, mh_adapter=True, non_linearity="gelu"),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8), adapters.ParBnConfig(reduction_factor=4)
    ),
}
FAMILIES = ("llama", "gpt2", "bert")
STEPS, RATE = 4, 0.1


def weights(model, kind):
    """The adapter's tensors, and the matrices that its orthogonal projections stand for."""
    found = {key: p.detach().clone() for key, p in model.named_parameters() if f".{kind}." in key}
    for path, module in model.named_modules():
        if f".{kind}." in path and path.endswith(".projection"):
            found[f"{path}.weight"] = module.weight.detach().clone()
    return found


def logits(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def main():
    torch.set_default_dtype(torch.float64)  # ReFT makes zeros without a dtype
    tensors = {}
    for name in FAMILIES:
        torch.manual_seed(1)
        model = BASES[name]().double().eval()
        scrambled(model.parameters())
        model.tie_weights()
        ids = torch.randint(3, 32, (2, 7))
        tensors[f"{name}/ids"] = ids
        for key, value in model.state_dict().items():
            tensors[f"{name}/base/{key}"] = value.clone()
        adapters.init(model)
        for kind, config in KINDS.items():
            # Under SDPA, AdapterHub's rows without padding lose as many of their last keys as a prefix has.
            model.config._attn_implementation = "eager" if kind == "mam" else "sdpa"
            model.add_adapter(kind, config=config)
            model.double()
            model.train_adapter(kind)
            model.eval()
            own = [p for key, p in model.named_parameters() if f".{kind}." in key]
            if "loreft" not in kind:
                scrambled(own)
            for key, value in weights(model, kind).items():
                tensors[f"{name}/{kind}/{key}"] = value
            losses, optimizer = [], torch.optim.SGD(own, RATE)
            for step in range(STEPS):
                out = logits(model, ids)
                if not step:
                    tensors[f"{name}/{kind}/logits"] = out.detach()
                loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            tensors[f"{name}/{kind}/losses"] = torch.stack(losses)
            with torch.no_grad():
                tensors[f"{name}/{kind}/learned"] = logits(model, ids)
            model.set_active_adapters(None)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        Path(__file__).parent / "adapterhub_more.safetensors",
    )


if __name__ == "__main__":
    main()
