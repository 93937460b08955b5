"""Tiny random models of many architectures, built from their configurations alone."""

from __future__ import annotations

import torch
import transformers as tf

from inlay.methods.over import Over
from inlay.methods.table import METHODS

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

BART = dict(
    vocab_size=48, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
PAD_ONE = {**ENCODER, "pad_token_id": 1}
IMAGES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
TEXT = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, projection_dim=8, max_position_embeddings=16,
)  # fmt: skip

MORE = {
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**small(head_dim=4, sliding_window=4))),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**small())),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **small(num_local_experts=4, num_experts_per_tok=2, head_dim=4, experts_implementation="eager")
        )
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **small(
                num_key_value_heads=4, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1,
                num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                qk_nope_head_dim=4, v_head_dim=6, experts_implementation="eager",
            )
        )
    ),
    "biogpt": lambda: tf.BioGptForCausalLM(
        tf.BioGptConfig(**small("num_key_value_heads", pad_token_id=1, scale_embedding=True))
    ),
    "xglm": lambda: tf.XGLMForCausalLM(
        tf.XGLMConfig(
            vocab_size=48, d_model=16, ffn_dim=24, num_layers=2, attention_heads=4, max_position_embeddings=64
        )
    ),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2, head_dim=8, num_heads=4,
            n_groups=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **small(
                num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
                experts_implementation="eager",
            )
        )
    ),
    "mpnet": lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**PAD_ONE)),
    "longformer": lambda: tf.LongformerForMaskedLM(tf.LongformerConfig(**PAD_ONE, attention_window=[4, 4])),
    "yoso": lambda: tf.YosoForMaskedLM(tf.YosoConfig(**PAD_ONE, use_expectation=True)),
    "rwkv": lambda: tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, intermediate_size=24, rescale_every=1)
    ),
    "nemotron": lambda: tf.NemotronForCausalLM(tf.NemotronConfig(**small(head_dim=4))),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**ENCODER, embedding_size=8)),
    "roberta_classifier": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**PAD_ONE)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART, scale_embedding=True)),
    "bart_classifier": lambda: tf.BartForSequenceClassification(tf.BartConfig(**BART)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(
        tf.PegasusConfig(**{**BART, "pad_token_id": 0}, scale_embedding=True)
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=8, max_target_positions=16, begin_suppress_tokens=None, suppress_tokens=None,
        )
    ),
    "wav2vec2": lambda: tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(
            **ENCODER, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(2, 2), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ),
    "clip_text": lambda: tf.CLIPTextModelWithProjection(tf.CLIPTextConfig(**TEXT)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGES, projection_dim=8)),
    "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**IMAGES)),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**small()), vision_config=tf.CLIPVisionConfig(**IMAGES), image_token_index=47
        )
    ),
}  # fmt: skip
"""Families that stand for one trait each; tests of all architectures leave them out."""


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """A random model of the architecture `name`, ready for inference; every norm and bias is random too."""
    torch.manual_seed(seed)
    model = {**ZOO, **MORE}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:  # the usual start is so small that attention would hardly matter
                parameter.mul_(4)
    return model.to(dtype)


FITTING = {
    "bitfit": {"add_bias": True}, "miss": {"r": 4}, "hira": {"r": 2}, "road": {"group_size": 8}, "randlora": {"r": 4},
    "c3a": {"block_size": 8}, "gralora": {"r": 4}, "shira": {"r": 2},
    "selective": {"select": "attention of last 1; norms"}, "trained_tokens": {"token_indices": [*range(3, 48)]},
    "full": {"targets": "all-linear"}, "merged_lora": {"enable_lora": [True, False], "targets": "all-linear"},
    "alora": {"alora_invocation_tokens": [5]},
}  # fmt: skip
"""By the name of a method: settings that fit such bases, where its defaults are for wider ones or for biases."""

REFUSED = {"t5": {"unmoved_prefix", "gated_prefix", "unipelt", "alora"}}
"""By the name of a base: methods that have no place there, and say so."""

ALONE = [name for name, kind in METHODS.items() if kind.over is Over.over]
"""Names of the methods that need no other adapter."""
