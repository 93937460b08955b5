"""Tiny random models of many architectures, built from their configurations alone."""

from __future__ import annotations

import torch
import transformers as tf

SMALL = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def small(*without: str, **more: object) -> dict:
    return {**{k: v for k, v in SMALL.items() if k not in without}, **more}


ENCODER = small("num_key_value_heads", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

ZOO = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small())),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**small(head_dim=4))),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **small(head_dim=4, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        )
    ),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**small(sliding_window=4, head_dim=4))),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**small())),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small("num_key_value_heads"))),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=48, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            dropout=0.0,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **small(
                head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                experts_implementation="eager",
            )
        ),
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**ENCODER)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8,
            patch_size=4, num_labels=3,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(
            vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    ),
}  # fmt: skip


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """A random model of the architecture `name`, ready for inference; every norm and bias is random too."""
    torch.manual_seed(seed)
    model = ZOO[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:  # the usual start is so small that attention would hardly matter
                parameter.mul_(4)
    return model.to(dtype)
