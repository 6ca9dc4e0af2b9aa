"""Models of text alone: every kind of position, attention and memory beside it."""

from __future__ import annotations

from typing import Any

from .base import BASE, HEAD, NO_KV, NO_TOKENS, SLIDING, Architecture

FALCON = {k: v for k, v in NO_KV.items() if k != "intermediate_size"}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
OPT = {k: v for k, v in NO_KV.items() if k not in ("intermediate_size", "initializer_range")}


def text(config: str, settings: dict[str, Any], **kwargs: Any) -> Architecture:
    """A causal language model."""
    return Architecture(config, settings, **kwargs)


TEXT = {
    # rotary positions, nothing else
    "llama": text("Llama", HEAD),
    "qwen2, key bias": text("Qwen2", BASE),
    "qwen3": text("Qwen3", HEAD),
    "gpt_neox, partial rotary": text("GPTNeoX", NO_KV | {"rotary_pct": 0.25}),
    "gptj, interleaved": text(
        "GPTJ",
        {"vocab_size": 97, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4,
         "rotary_dim": 8, "initializer_range": 0.2, **NO_TOKENS},
    ),
    "cohere, interleaved": text("Cohere", BASE | {"logit_scale": 1.0}),
    "phi": text("Phi", BASE),
    "phi3": text("Phi3", BASE),
    "falcon, multi-query": text("Falcon", FALCON | {"multi_query": True}),
    "olmo2": text("Olmo2", BASE),
    "granite": text("Granite", BASE),
    "stablelm": text("StableLm", BASE),
    "starcoder2": text("Starcoder2", BASE | {"sliding_window": None}),
    "glm4": text("Glm4", HEAD),
    "nemotron": text("Nemotron", HEAD),
    "persimmon": text("Persimmon", NO_KV),
    "helium": text("Helium", HEAD),
    "apertus": text("Apertus", HEAD),
    "seed_oss": text("SeedOss", HEAD),
    "nanochat": text("NanoChat", BASE),
    "diffllama": text("DiffLlama", HEAD),
    "hunyuan, norm after the turn": text("HunYuanDenseV1", HEAD),
    # sliding, chunked, or without rotation in some layers
    "mistral, sliding": text("Mistral", HEAD | {"sliding_window": 12}),
    "gemma2, sliding and softcap": text(
        "Gemma2", HEAD | {"sliding_window": 12, "query_pre_attn_scalar": 16}, attention="eager"
    ),
    "gemma3, sliding": text("Gemma3Text", HEAD | SLIDING | {"query_pre_attn_scalar": 16}),
    "olmo3, sliding": text("Olmo3", BASE | SLIDING),
    "ministral, sliding": text("Ministral", HEAD | SLIDING),
    "modernbert_decoder, sliding": text(
        "ModernBertDecoder",
        NO_KV | {"local_attention": 24, "layer_types": SLIDING["layer_types"]},
    ),
    "smollm3, no rotation in a layer": text("SmolLM3", BASE | {"no_rope_layers": [1, 0]}),
    "cohere2, no rotation in a layer": text("Cohere2", BASE | SLIDING | {"logit_scale": 1.0}),
    "exaone4, no rotation in a layer": text("Exaone4", HEAD | SLIDING),
    "llama4, chunked": text(
        "Llama4Text",
        HEAD | MOE | {
            "attention_chunk_size": 8, "no_rope_layers": [1, 0], "intermediate_size_mlp": 64,
            "moe_layers": [1], "floor_scale": 16,
        },
    ),
    "gemma3n, shared keys and values": text(
        "Gemma3nText",
        HEAD | {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
            "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4, shared keys and values": text(
        "Gemma4Text",
        HEAD | {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16,
            "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
        },
    ),
    # absolute positions, or alibi
    "gpt2": text(
        "GPT2",
        {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
         "initializer_range": 0.2, **NO_TOKENS},
    ),
    "gpt_bigcode, multi-query": text(
        "GPTBigCode",
        {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
         "initializer_range": 0.2, **NO_TOKENS},
    ),
    "gpt_neo, local": text(
        "GPTNeo",
        {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 12,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256,
         "initializer_range": 0.2, **NO_TOKENS},
    ),
    "opt": text("OPT", OPT | {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.2}),
    "biogpt": text("BioGpt", NO_KV),
    "xglm": text(
        "XGLM",
        {"vocab_size": 97, "d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
         "init_std": 0.2, "max_position_embeddings": 256, **NO_TOKENS},
    ),
    "bloom, alibi": text(
        "Bloom",
        {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2,
         **NO_TOKENS},
    ),
    "mpt, alibi": text(
        "Mpt",
        {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256,
         "initializer_range": 0.2, "use_cache": True, **NO_TOKENS},
    ),
    "falcon, alibi": text("Falcon", FALCON | {"multi_query": False, "alibi": True}),
    # mixtures of experts
    "mixtral": text("Mixtral", HEAD | MOE),
    "qwen2_moe": text("Qwen2Moe", BASE | ROUTED),
    "qwen3_moe": text("Qwen3Moe", HEAD | ROUTED),
    "olmoe": text("Olmoe", BASE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": text("Phimoe", BASE | MOE),
    "granitemoe": text("GraniteMoe", BASE | MOE),
    "minimax_m2": text("MiniMaxM2", HEAD | MOE),
    "gpt_oss, sliding and attention sinks": text("GptOss", HEAD | MOE | {"sliding_window": 12}),
    "glm4_moe": text(
        "Glm4Moe",
        HEAD | ROUTED | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                         "first_k_dense_replace": 1},
    ),
    "hunyuan_moe, norm after the turn": text(
        "HunYuanMoEV1", HEAD | {"num_experts": 4, "moe_topk": 2}
    ),
    "afmoe, no rotation in a layer": text(
        "Afmoe", HEAD | ROUTED | SLIDING | {"num_shared_experts": 1, "num_dense_layers": 1}
    ),
    "flint, no rotation in a layer": text("Flint", HEAD | ROUTED | SLIDING),
    # latent attention: keys wider than values
    "deepseek_v2": text(
        "DeepseekV2", BASE | LATENT | {"first_k_dense_replace": 2, "n_routed_experts": 4,
                                       "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ),
    "deepseek_v3": text("DeepseekV3", BASE | LATENT | {"first_k_dense_replace": 2}),
    "youtu": text("Youtu", BASE | LATENT),
    "mimo_v2_flash, keys wider": text(
        "MiMoV2Flash",
        HEAD | SLIDING | {"v_head_dim": 8, "mlp_layer_types": ["dense", "sparse"],
                          "n_routed_experts": 4, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 32},
    ),
    # attention beside other kinds of memory
    "lfm2, conv hybrid": text(
        "Lfm2", HEAD | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    ),
    "qwen3_next, linear hybrid": text("Qwen3Next", HEAD | ROUTED | LINEAR),
    "qwen3_5, linear hybrid": text("Qwen3_5Text", HEAD | LINEAR),
    "olmo_hybrid, linear hybrid": text("OlmoHybrid", BASE | LINEAR),
    # transformers' own cache counts by its first layer, which here as in MiniMax-Text-01 holds no
    # tokens, so that padding is lost; and beams leave the states where they are
    "minimax, linear hybrid": text(
        "MiniMax",
        HEAD | MOE | {"layer_types": LINEAR["layer_types"], "block_size": 8},
        uncached=True,
    ),
    "kimi_linear, linear hybrid": text(
        "KimiLinear",
        BASE | LATENT | MOE | {
            "layer_types": LINEAR["layer_types"], "linear_head_dim": 16, "linear_num_heads": 4,
            "moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"],
            "q_lora_rank": None,
        },
    ),
    "granite_hybrid, mamba": text(
        "GraniteMoeHybrid",
        BASE | MOE | MAMBA2 | {
            "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "falcon_h1, mamba in each layer": text(
        "FalconH1", BASE | MAMBA2 | {"mamba_d_ssm": 128}
    ),
    "jamba, mamba": text(
        "Jamba",
        BASE | {
            "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
            "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8,
        },
    ),
    "bamba, mamba": text("Bamba", BASE | MAMBA2 | {"attn_layer_indices": [1]}),
    "zamba2, mamba": text(
        "Zamba2",
        BASE | {
            "num_hidden_layers": 3, "num_key_value_heads": 4, "mamba_d_state": 8,
            "layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 8,
            "mamba_ngroups": 1, "chunk_size": 8, "use_mamba_kernels": False, "num_mem_blocks": 1,
            "use_mem_rope": True,
        },
    ),
    "nemotron_h, mamba": text(
        "NemotronH",
        {k: v for k, v in HEAD.items() if k != "num_hidden_layers"} | {
            "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8,
            "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "recurrent_gemma": text(
        "RecurrentGemma",
        BASE | {
            "num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 64,
            "w_init_variance_scale": 0.5,
        },
    ),
}  # fmt: skip
