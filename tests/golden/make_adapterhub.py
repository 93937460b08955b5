"""Makes adapterhub.safetensors: logits of AdapterHub's bottleneck adapters on tiny random models.

AdapterHub's package pins an older transformers, so it runs in an environment of its own:

    python3.11 -m venv /tmp/adapterhub && /tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0
    /tmp/adapterhub/bin/python tests/golden/make_adapterhub.py

The file holds, for each architecture, the base's state dict, token ids, the base's logits, and for each kind of adapter
its weights (by AdapterHub's names) and the logits with it, all float64.
"""

from pathlib import Path

import adapters
import torch
import transformers as tf
from safetensors.torch import save_file

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
BASES = {
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip
KINDS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
}


def scrambled(parameters):
    with torch.no_grad():
        for parameter in parameters:
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.shape[0] == 32 else 0.25))


def main():
    tensors = {}
    for name, build in BASES.items():
        torch.manual_seed(0)
        model = build().double().eval()
        scrambled(model.parameters())
        model.tie_weights()
        ids = torch.randint(3, 32, (2, 6))
        tensors[f"{name}/ids"] = ids
        for key, value in model.state_dict().items():
            tensors[f"{name}/base/{key}"] = value.clone()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "t5":
            inputs["decoder_input_ids"] = ids.flip(1)
        with torch.no_grad():
            tensors[f"{name}/logits"] = model(**inputs).logits
        adapters.init(model)
        for kind, config in KINDS.items():
            model.add_adapter(kind, config=config)
            model.double()
            own = {key: p for key, p in model.named_parameters() if f".{kind}." in key}
            scrambled(own.values())
            model.set_active_adapters(kind)
            for key, value in own.items():
                tensors[f"{name}/{kind}/{key}"] = value.detach().clone()
            with torch.no_grad():
                tensors[f"{name}/{kind}/logits"] = model.eval()(**inputs).logits
            model.set_active_adapters(None)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, Path(__file__).parent / "adapterhub.safetensors"
    )


if __name__ == "__main__":
    main()
