"""Makes files_*.safetensors and written_*.safetensors: folders that AdapterHub saved, and what it makes of ours.

It runs in the environment that make_adapterhub.py describes; bases and token ids are those of adapterhub_more:

    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_files.py
    PYTHONPATH=tests python -m adapterhub /tmp/written
    /tmp/adapterhub/bin/python tests/golden/make_adapterhub_files.py /tmp/written

The first line saves one adapter of each kind to a folder, as AdapterHub does, and keeps its tensors, its config and the
logits with it. The second, where Inlay is installed, opens each and saves it in AdapterHub's format. The third opens
those in AdapterHub, and keeps what Inlay wrote and the logits that AdapterHub has with it. Weights are float32. So it
makes inputs_*.safetensors too, of an IA³ that began in Inlay.
"""

import json
import sys
import tempfile
from pathlib import Path

import adapters
import torch
import transformers as tf
from make_adapterhub import BASES, SMALL, scrambled
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SEQ, DOUBLE, PAR, LORA = adapters.SeqBnConfig, adapters.DoubleSeqBnConfig, adapters.ParBnConfig, adapters.LoRAConfig
PREFIX, IA3, VERA, DORA = adapters.PrefixTuningConfig, adapters.IA3Config, adapters.VeraConfig, adapters.DoRAConfig
DVORA = adapters.configuration.adapter_config.DvoRAConfig
SHORT = PREFIX(prefix_length=3, bottleneck_size=4)
BOTTLENECKS = {
    "seq_bn": SEQ(reduction_factor=4),
    "double_seq_bn": DOUBLE(reduction_factor=4, leave_out=[0]),
    "par_bn": PAR(reduction_factor=4, dropout=0.1),
    "scaled_par_bn": PAR(reduction_factor=4, scaling="learned"),
    "seq_bn_inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "double_seq_bn_inv": adapters.DoubleSeqBnInvConfig(reduction_factor=4),
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=4),
    "adapter_plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
}
LINEAR = {
    "lora": LORA(r=2, alpha=6, dropout=0.1),
    "lora_mlp": LORA(r=2, intermediate_lora=True, output_lora=True, attn_matrices=["k"], leave_out=[1]),
    "lora_gated": LORA(r=2, alpha=6, attn_matrices=["q"], use_gating=True),
    "lora_mlp_alone": LORA(r=2, selfattn_lora=False, output_lora=True),
    "ia3": IA3(alpha=2),
}
REFT = {
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "loreft_tied": adapters.LoReftConfig(r=1, suffix_positions=1, tied_weights=True, layers=[1], non_linearity="relu"),
    "noreft": adapters.NoReftConfig(r=2),
    "direft": adapters.DiReftConfig(r=2),
}
VIRTUAL = {
    "prefix_tuning": SHORT,
    "prefix_tuning_flat": PREFIX(prefix_length=3, flat=True),
    "mam": adapters.MAMConfig(SHORT, PAR(reduction_factor=4)),
}
MORE = {
    "dora": DORA(r=2),
    "dora_scaled": DORA(r=2, alpha=6, attn_matrices=["q", "k", "v"]),
    "vera": VERA(r=2, alpha=4, attn_matrices=["q"]),
    "dvora": DVORA(r=2, attn_matrices=["q"]),
    "mtl_lora": adapters.MTLLoRAConfig(r=2),
    "unipelt": adapters.UniPELTConfig(PREFIX(prefix_length=2, bottleneck_size=4), SEQ(reduction_factor=8), LORA(r=1)),
}
PLAIN = {key: config for key, config in LINEAR.items() if key != "lora_gated"}
SOME = {key: BOTTLENECKS[key] for key in ("seq_bn", "double_seq_bn", "par_bn")}
KINDS = {
    "llama_bottlenecks": BOTTLENECKS,
    "llama_linear": LINEAR | {key: MORE[key] for key in ("dora", "dora_scaled", "vera", "dvora", "mtl_lora")},
    "llama_others": REFT | VIRTUAL,
    "llama_unipelt": {"unipelt": MORE["unipelt"]},
    "gpt2": SOME | PLAIN | {"prefix_tuning_flat": VIRTUAL["prefix_tuning_flat"], "loreft": REFT["loreft"]},
    "bert": SOME | PLAIN | {
        "prefix_tuning": SHORT,
        "prompt_tuning": adapters.PromptTuningConfig(prompt_length=2), "dora": MORE["dora"], "noreft": REFT["noreft"],
    },
}  # fmt: skip
"""By the golden file: the base's name is what stands before "_"."""
NAME = "theirs"
ENCODER = SMALL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
DECODER = SMALL | dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=4, query_pre_attn_scalar=4)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**ENCODER)),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**ENCODER, embedding_size=16)),
}
"""Other bases, whose weights and token ids the files hold themselves, with some kinds of adapters."""
WHOLE = {
    "lora": LORA(r=2, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    "double_seq_bn": DOUBLE(reduction_factor=8),
    "seq_bn": SEQ(reduction_factor=8),
    "par_bn": PAR(reduction_factor=8),
}
SIZES = {
    "sizes": SEQ(reduction_factor={"default": 4, "1": 8}),
    "sizes_of_each": DOUBLE(reduction_factor={"0": 8, "1": 2}),
    "sizes_beside": PAR(reduction_factor={"default": 16, "0": 4}, leave_out=[1]),
}
KINDS |= {f"{name}_sizes": SIZES for name in ("llama", "gpt2", "bert")}
KINDS |= dict.fromkeys(MODELS, WHOLE)
KINDS["phi"] = {kind: config for kind, config in WHOLE.items() if kind != "par_bn"}  # which AdapterHub cannot run there
KINDS |= {
    name: WHOLE | {"prefix_tuning_flat": VIRTUAL["prefix_tuning_flat"]} for name in ("mistral", "roberta", "electra")
}


def model_of(name):
    if name in MODELS:
        torch.manual_seed(5)
        model = MODELS[name]().double().eval()
        scrambled(model.parameters())
        model.tie_weights()
        model.float().double()
        base = {f"base/{key}": value.float().clone() for key, value in model.state_dict().items()}
        model.config._attn_implementation = "eager"
        adapters.init(model)
        return model, torch.randint(3, 32, (2, 7)), base
    bases = load_file(HERE / "adapterhub_more.safetensors")
    start = f"{name}/base/"
    model = BASES[name]().double().eval()
    model.load_state_dict({k.removeprefix(start): v for k, v in bases.items() if k.startswith(start)})
    model.tie_weights()
    model.config._attn_implementation = "eager"  # under SDPA, rows without padding lose keys where there is a prefix
    adapters.init(model)
    return model, bases[f"{name}/ids"], {}


def logits(model, ids, name):
    model.set_active_adapters(name)
    model.double().eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def scramble(model):
    """Other values for an adapter's parameters; ReFT's bases stay orthonormal."""
    own = {key: p for key, p in model.named_parameters() if f".{NAME}." in key}
    free = [p for key, p in own.items() if "parametrizations" not in key]
    scrambled(free)
    with torch.no_grad():
        for key, parameter in own.items():
            if key.endswith("parametrizations.weight.original"):
                parameter.add_(torch.randn_like(parameter).triu(1) * 0.3)
            elif key.endswith("loras.theirs.m.weight"):
                parameter.abs_()


def theirs(file, kinds):
    """Each kind as AdapterHub saves it: its config as JSON in the file's metadata."""
    tensors, configs = {}, {}
    for kind, config in kinds.items():
        torch.manual_seed(len(tensors))
        model, ids, base = model_of(file.partition("_")[0])
        model.add_adapter(NAME, config=config)
        scramble(model)
        model.float().double()
        with tempfile.TemporaryDirectory() as folder:
            model.float().save_adapter(folder, NAME)
            stored = torch.load(Path(folder) / "pytorch_adapter.bin")  # noqa: TID251
            configs[kind] = json.dumps(json.loads((Path(folder) / "adapter_config.json").read_text()))
        tensors |= {f"{kind}/{key}": value.float().clone().contiguous() for key, value in stored.items()}
        tensors[f"{kind}/logits"] = logits(model, ids, NAME)
        tensors |= {**base, "ids": ids} if base else {}
    save_file(tensors, HERE / f"files_{file}.safetensors", metadata=configs)


def ours(base, written, target):
    """What Inlay wrote to folders in `written`, and AdapterHub's logits with it."""
    tensors, configs = {}, {}
    for folder in sorted(written.iterdir()):
        model, ids, _ = model_of(base)
        name = model.load_adapter(str(folder), use_safetensors=True)
        stored = load_file(folder / "adapter.safetensors")
        missing = {key for key in model.state_dict() if f".{name}." in key} - stored.keys()
        missing = {key for key in missing if ".pool." not in key and not ("units" in key and "reft" in key)}
        assert not missing, (folder, missing)
        kind = folder.name
        tensors |= {f"{kind}/{key}": value.float().contiguous() for key, value in stored.items()}
        tensors[f"{kind}/logits"] = logits(model, ids, name)
        configs[kind] = json.dumps(json.loads((folder / "adapter_config.json").read_text()))
    save_file(tensors, HERE / target, metadata=configs)


def main():
    torch.set_default_dtype(torch.float64)  # ReFT makes zeros without a dtype
    for file, kinds in KINDS.items():
        if len(sys.argv) == 1:
            theirs(file, kinds)
        elif (Path(sys.argv[1]) / file).is_dir():
            ours(file.partition("_")[0], Path(sys.argv[1]) / file, f"written_{file}.safetensors")
    for folder in (Path(sys.argv[1]) / "inputs").iterdir() if len(sys.argv) > 1 else ():
        ours(folder.name, folder, f"inputs_{folder.name}.safetensors")


if __name__ == "__main__":
    main()
