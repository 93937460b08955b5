"""What the rules of `configs.py` cannot know: fields of single types and of single configuration classes."""

from __future__ import annotations

from typing import Any

__all__ = ["HINTS", "NESTED"]

HINTS: dict[str, dict[str, Any]] = {
    "zamba": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "dory": {"layer_types": ["full_attention"] * 3},
}
"""Fields by model type; "text_config.x" is for a part."""

SWIN = {"image_size": 32, "window_size": 2, "depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16}
NESTED: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "CodeGenConfig": {"rotary_dim": 4},
    "GPTJConfig": {"rotary_dim": 4},
    "Dots3NoteConfig": {"num_key_value_heads": 4},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "ZambaConfig": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Zamba2Config": {"n_mamba_heads": 8, "mamba_headdim": 8},
    "DbrxConfig": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "DoryConfig": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "KimiLinearConfig": {"num_experts": 4, "n_routed_experts": 4},
    "Mamba2Config": {"num_heads": 8},
    "NemotronHConfig": {"n_groups": 1},
    "ReformerConfig": {
        "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ("local", "local"),
        "local_attn_chunk_length": 4,
    },
    "XmodConfig": {"languages": ("en_XX",), "default_language": "en_XX"},
    "EsmConfig": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "absolute"},
    "EsmcConfig": {"num_key_value_heads": 4},
    "MobileBertConfig": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "NystromformerConfig": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "NeoMMEConfig": {"head_dim": 16},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "LiltConfig": {"hidden_size": 48},
    "LayoutLMv3Config": {"coordinate_size": 4, "shape_size": 8},
    "PerceiverConfig": {
        "num_self_attends_per_block": 1, "num_blocks": 1, "d_latents": 32, "d_model": 32, "num_latents": 4,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
    },
    "SwinConfig": SWIN,
    "DonutSwinConfig": SWIN,
    "Swinv2Config": SWIN,
    "BitConfig": {"num_groups": 4},
    "MobileNetV1Config": {"depth_multiplier": 0.25},
    "GraniteSpeech5CTCConfig": {"context_size": 8},
    "Llama4VisionConfig": {
        "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    },
    "Blip2Config": {"image_token_index": 127},
    "InstructBlipConfig": {"image_token_index": 127},
    "Mistral4Config": {"head_dim": 16},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 90, "vision_end_token_id": 91},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 90, "vision_end_token_id": 91},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "ShieldGemma2Config": {"mm_tokens_per_image": 4},
    "LlavaNextConfig": {"image_grid_pinpoints": [[16, 16]]},
    "LlavaNextVideoConfig": {"image_grid_pinpoints": [[16, 16]]},
    "LlavaOnevisionConfig": {"image_grid_pinpoints": [[16, 16]]},
    "GraniteDoclingConfig": {"image_grid_pinpoints": [[16, 16]]},
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "VoxtralEncoderConfig": {"intermediate_size": 128},
    "GraniteSpeechConfig": {"window_size": 4, "downsample_rate": 2},
    "GraniteSpeechPlusConfig": {"window_size": 4, "downsample_rate": 2},
    "GraniteSpeechEncoderConfig": {"max_pos_emb": 8, "context_size": 8},
    "MllamaVisionConfig": {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 64},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "CpmAntConfig": {"dim_ff": 48},
    "CTRLConfig": {"dff": 48},
}  # fmt: skip
"""Fields by the name of a configuration class, wherever it is a part."""
