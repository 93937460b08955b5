"""Makes bottlenecks_*.safetensors, three for each base: what AdapterHub's bottleneck family gives, and its gradients.

It runs in the environment that make_adapterhub.py describes; bases and token ids are those of adapterhub_more:

    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_bottlenecks.py

A file holds, for one base and each kind of adapter, its weights laid end to end, the logits with them, and the gradient
of a language model's loss for all weights, computed in float64 and kept as float32. `names` are the bytes of zlib's
compressed JSON: for each kind, the weights' names in AdapterHub and their shapes, in order.
"""

import json
import zlib
from pathlib import Path

import adapters
import torch
from make_adapterhub import BASES
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FAMILIES = ("llama", "gpt2", "bert")
SEQ, DOUBLE, PAR = adapters.SeqBnConfig, adapters.DoubleSeqBnConfig, adapters.ParBnConfig
COMPACTER = adapters.CompacterConfig
NETWORKS = {
    "inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "double_inv": adapters.DoubleSeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=4),
    "plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "compacter": COMPACTER(reduction_factor=4),
    "compacter_pp": adapters.CompacterPlusPlusConfig(reduction_factor=2, phm_rank=2, non_linearity="tanh"),
    "own_rules": COMPACTER(reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False),
    "factor_rules": COMPACTER(reduction_factor=4, factorized_phm_rule=True, phm_bias=False, shared_W_phm=True),
}
SETTINGS = {
    "norms": DOUBLE(reduction_factor=4, ln_before=True, ln_after=True, scaling=2.0),
    "norm_of_sum": SEQ(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True, scaling="learned"),
    "par_norm": PAR(reduction_factor=4, ln_after=True, ln_before=True, mh_adapter=True),
    "behind": SEQ(reduction_factor=4, residual_before_ln=False),
    "post_add": SEQ(reduction_factor=4, residual_before_ln="post_add"),
    "goes_on": SEQ(reduction_factor=4, residual_before_ln=False, original_ln_after=False, leave_out=[0]),
}
GATES = {
    "gated": SEQ(reduction_factor=4, use_gating=True),
    "par_gated": PAR(reduction_factor=4, use_gating=True, scaling="channel"),
    "unipelt": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
        SEQ(reduction_factor=4),
        adapters.LoRAConfig(r=2, alpha=2),
    ),
    "own_gates": adapters.PrefixTuningConfig(prefix_length=2, flat=True, use_gating=True, shared_gating=False),
    "gated_lora": adapters.LoRAConfig(r=2, alpha=6, use_gating=True),
}
UNDONE, PREFIXES = {"inv"}, {"unipelt", "own_gates"}
LEFT_OUT = {"llama": {"post_add"}, "gpt2": {"post_add", "gated_lora", "unipelt"}, "bert": set()}
"""What AdapterHub cannot run there ("post_add" without a norm), or lays out otherwise (LoRA on fused weights)."""


def made(model, name, kinds, ids):
    """What a file holds of some kinds of adapters."""
    tensors, names = {}, {}
    for kind, config in kinds.items():
        if kind in LEFT_OUT[name]:
            continue
        # Under SDPA, AdapterHub's rows without padding lose as many of their last keys as a prefix has.
        model.config._attn_implementation = "eager" if kind in PREFIXES else "sdpa"
        model.add_adapter(kind, config=config)
        model.double()
        model.train_adapter(kind)
        model.eval()
        own = {key: p for key, p in model.named_parameters() if kind in key.split(".")}
        with torch.no_grad():
            for parameter in own.values():
                wide = torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3)
                parameter.copy_((parameter + wide).float())
        hook = None
        if kind in UNDONE:  # as AdapterHub's interface for other bases does, and its own heads; static classes do not
            undo = lambda _, args: (model.base_model.invertible_adapters_forward(args[0], rev=True),)  # noqa: E731
            hook = model.get_output_embeddings().register_forward_pre_hook(undo)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        if hook is not None:
            hook.remove()
        used = [(key, value, grad) for (key, value), grad in zip(own.items(), grads, strict=True) if grad is not None]
        tensors[f"{kind}/logits"] = logits.detach()
        tensors[f"{kind}/values"] = torch.cat([value.detach().flatten() for _, value, _ in used])
        tensors[f"{kind}/grads"] = torch.cat([grad.flatten() for *_, grad in used])
        names[kind] = [(key, list(value.shape)) for key, value, _ in used]
        model.set_active_adapters(None)
    packed = zlib.compress(json.dumps(names).encode(), 9)
    tensors = {key: value.float().contiguous() for key, value in tensors.items()}
    return {**tensors, "names": torch.tensor(list(packed), dtype=torch.uint8)}


def main():
    torch.set_default_dtype(torch.float64)
    bases = load_file(HERE / "adapterhub_more.safetensors")
    for name in FAMILIES:
        model = BASES[name]().double().eval()
        start = f"{name}/base/"
        model.load_state_dict({k.removeprefix(start): v for k, v in bases.items() if k.startswith(start)})
        model.tie_weights()
        adapters.init(model)
        torch.manual_seed(3)
        for part, kinds in (("networks", NETWORKS), ("settings", SETTINGS), ("gates", GATES)):
            tensors = made(model, name, kinds, bases[f"{name}/ids"])
            save_file(tensors, HERE / f"bottlenecks_{name}_{part}.safetensors")


if __name__ == "__main__":
    main()
