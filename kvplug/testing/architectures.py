"""Tiny random models of every kind of architecture: what the cache meets in transformers.

A model has a few layers, a vocabulary of about 100 and wide weights, so that next-token scores lie
far apart; norms are drawn too, so that nothing is hidden behind weights of 1. Where the installed
transformers has no such architecture, `make` raises `Absent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .tools import normal, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HEAD = BASE | {"head_dim": 16}
NO_KV = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
FALCON = {k: v for k, v in NO_KV.items() if k != "intermediate_size"}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
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
NO_TOKENS = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
SEEN = {"vocab_size": 101}  # of models that see or hear: 98 and on are theirs
IMAGE, AUDIO = 99, 98
CLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def ids_with(token: int, count: int, ids: Tensor) -> Tensor:
    """Token ids [B, S] with `count` placeholders after the first."""
    return torch.cat((ids[:, :1], ids.new_full((len(ids), count), token), ids[:, 1:]), 1)


def one_image(ids: Tensor) -> dict[str, Tensor]:
    """A picture of 16 x 16, four patches."""
    pixels = normal(len(ids), 3, 16, 16, seed=5)
    return {"input_ids": ids_with(IMAGE, 4, ids), "pixel_values": pixels}


def one_image_with_types(ids: Tensor) -> dict[str, Tensor]:
    """The same, and which tokens are the picture's."""
    inputs = one_image(ids)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def one_grid(ids: Tensor) -> dict[str, Tensor]:
    """A picture as the Qwens see it: a grid of 4 x 4 patches, of which 2 x 2 are one token."""
    B = len(ids)
    inputs = ids_with(IMAGE, 4, ids)
    return {
        "input_ids": inputs,
        "pixel_values": normal(B * 16, 3 * 2 * 4 * 4, seed=5),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * B),
        "mm_token_type_ids": (inputs == IMAGE).int(),
    }


def one_tile(ids: Tensor) -> dict[str, Tensor]:
    """A picture as Idefics and SmolVLM take it: [B, pictures, 3, 16, 16]."""
    pixels = normal(len(ids), 1, 3, 16, 16, seed=5)
    return {"input_ids": ids_with(IMAGE, 1, ids), "pixel_values": pixels}


def one_cross_attended(ids: Tensor) -> dict[str, Tensor]:
    """A picture that Mllama's cross-attention layers look at."""
    B, S = ids.shape
    return {
        "input_ids": ids,
        "pixel_values": normal(B, 1, 1, 3, 16, 16, seed=5),
        "aspect_ratio_ids": torch.ones(B, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(B, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(B, S, 1, 1, dtype=torch.long),
    }


def one_sound(ids: Tensor) -> dict[str, Tensor]:
    """A sound of 40 frames for Qwen2-Audio: ten tokens."""
    return {
        "input_ids": ids_with(AUDIO, 10, ids),
        "input_features": normal(len(ids), 8, 40, seed=5),
        "feature_attention_mask": torch.ones(len(ids), 40, dtype=torch.long),
    }


def one_voice(ids: Tensor) -> dict[str, Tensor]:
    """A sound of 40 frames for Voxtral: five tokens."""
    features = normal(len(ids), 8, 40, seed=5)
    return {"input_ids": ids_with(AUDIO, 5, ids), "input_features": features}


@dataclass(frozen=True)
class Architecture:
    """How to build one: the config's name without `Config`, its settings, and what it is fed."""

    config: str
    settings: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    media: Callable[[Tensor], dict[str, Tensor]] | None = None  # ids -> inputs with picture, sound
    source: str = ""  # of an encoder-decoder: "text", "speech" or "wave"
    attention: str | None = None
    typed: bool = False  # it must be told which tokens are a picture's, in a text without any too


def text(config: str, settings: dict[str, Any], **kwargs: Any) -> Architecture:
    """A causal language model."""
    return Architecture(config, settings, **kwargs)


def seeing(config: str, settings: dict[str, Any], media: Callable, **kwargs: Any) -> Architecture:
    """A model of text and pictures."""
    return Architecture(config, settings, "AutoModelForImageTextToText", media, **kwargs)


ARCHITECTURES = {
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
    "minimax, linear hybrid": text(
        "MiniMax", HEAD | MOE | {"layer_types": LINEAR["layer_types"], "block_size": 8}
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
    # text and pictures
    "llava": seeing(
        "Llava",
        {"text_config": {"model_type": "llama", **HEAD, **SEEN},
         "vision_config": {"model_type": "clip_vision_model", **CLIP}, "image_token_index": IMAGE,
         "image_seq_length": 4, "vision_feature_layer": -1},
        one_image,
    ),
    "gemma3, pictures": seeing(
        "Gemma3",
        {"text_config": {**HEAD, **SEEN, **SLIDING, "query_pre_attn_scalar": 16},
         "vision_config": {"model_type": "siglip_vision_model", **CLIP},
         "image_token_index": IMAGE, "mm_tokens_per_image": 4},
        one_image_with_types,
    ),
    "paligemma": seeing(
        "PaliGemma",
        {"text_config": {"model_type": "gemma", **HEAD, **SEEN},
         "vision_config": {"model_type": "siglip_vision_model", **CLIP, "projection_dim": 64},
         "image_token_index": IMAGE, "projection_dim": 64, "hidden_size": 64},
        one_image_with_types, typed=True,
    ),
    "smolvlm": seeing(
        "SmolVLM",
        {"text_config": {"model_type": "llama", **HEAD, **SEEN},
         "vision_config": {"model_type": "smolvlm_vision", **CLIP}, "image_token_id": IMAGE,
         "scale_factor": 2},
        one_tile,
    ),
    "qwen2_vl": seeing(
        "Qwen2VL",
        {"text_config": {**BASE, **SEEN, **MROPE},
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
                           "mlp_ratio": 2, "patch_size": 4},
         "image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 98},
        one_grid,
    ),
    "qwen2_5_vl": seeing(
        "Qwen2_5_VL",
        {"text_config": {**BASE, **SEEN, **MROPE},
         "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                           "intermediate_size": 32, "patch_size": 4, "window_size": 16,
                           "fullatt_block_indexes": [1]},
         "image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 98},
        one_grid,
    ),
    "qwen3_vl": seeing(
        "Qwen3VL",
        {"text_config": {**HEAD, **SEEN,
                         "rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}},
         "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                           "intermediate_size": 32, "patch_size": 4,
                           "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
         "image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 98},
        one_grid,
    ),
    "mllama, cross-attention": seeing(
        "Mllama",
        {"text_config": {**HEAD, **SEEN, "num_hidden_layers": 3, "cross_attention_layers": [1]},
         "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
                           "attention_heads": 2, "intermediate_size": 32, "image_size": 16,
                           "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 1,
                           "intermediate_layers_indices": [0],
                           "supported_aspect_ratios": [[1, 1]]},
         "image_token_index": IMAGE},
        one_cross_attended,
    ),
    # text and sound
    "qwen2_audio": Architecture(
        "Qwen2Audio",
        {"text_config": {"model_type": "qwen2", **BASE, **SEEN},
         "audio_config": {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
                          "encoder_ffn_dim": 32, "d_model": 32, "max_source_positions": 20},
         "audio_token_index": AUDIO},
        "AutoModelForSeq2SeqLM", one_sound,
    ),
    "voxtral": Architecture(
        "Voxtral",
        {"text_config": {"model_type": "llama", **HEAD, **SEEN},
         "audio_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 20},
         "audio_token_id": AUDIO},
        "AutoModelForSeq2SeqLM", one_voice,
    ),
    # an encoder before the decoder
    "t5": Architecture(
        "T5",
        {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "initializer_factor": 4.0, "decoder_start_token_id": 1, "eos_token_id": None,
         "pad_token_id": 0},
        "AutoModelForSeq2SeqLM", source="text",
    ),
    "bart": Architecture(
        "Bart",
        {"vocab_size": 97, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.2,
         "decoder_start_token_id": 1, "forced_eos_token_id": None, **NO_TOKENS},
        "AutoModelForSeq2SeqLM", source="text",
    ),
    "t5gemma, sliding": Architecture(
        "T5Gemma",
        {"encoder": {**HEAD, **SLIDING}, "decoder": {**HEAD, **SLIDING}, "vocab_size": 97,
         "decoder_start_token_id": 1, **NO_TOKENS},
        "AutoModelForSeq2SeqLM", source="text", attention="eager",
    ),
    "whisper": Architecture(
        "Whisper",
        {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
         "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
         "max_target_positions": 128, "init_std": 0.3, "decoder_start_token_id": 1,
         "suppress_tokens": None, "begin_suppress_tokens": None, **NO_TOKENS},
        "AutoModelForSpeechSeq2Seq", source="speech",
    ),
    "moonshine": Architecture(
        "Moonshine",
        {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64,
         "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2,
         "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
         "max_position_embeddings": 256, "initializer_range": 0.2, "decoder_start_token_id": 1,
         **NO_TOKENS},
        "AutoModelForSpeechSeq2Seq", source="wave",
    ),
}  # fmt: skip


class Absent(Exception):
    """The installed transformers has no such architecture."""


def make(name: str, seed: int = 0, **overrides: Any) -> Any:
    """The model of that name in `ARCHITECTURES`, on the CPU, ready for `generate`.

    overrides: of its settings.
    """
    architecture = ARCHITECTURES[name]
    kind = getattr(transformers, f"{architecture.config}Config", None)
    if kind is None:
        raise Absent(f"transformers {transformers.__version__} has no {architecture.config}Config")
    config = kind(**(architecture.settings | overrides))
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        auto = getattr(transformers, architecture.auto)
        options = {"attn_implementation": architecture.attention} if architecture.attention else {}
        model = auto.from_config(config, **options).eval()
    finally:
        torch.random.set_rng_state(state)
    for tokens in (model.generation_config, config):  # every run has its full length
        tokens.eos_token_id = None
    model.generation_config.pad_token_id = 0
    _draw_norms(model)
    if architecture.config == "Qwen2":  # as trained ones have it: a constant that dwarfs the rest
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data[5] = 100.0
    return model


def _draw_norms(model: torch.nn.Module) -> None:
    """Weights of norms off their start: what commutes with a weight of 1 need not with others."""
    for i, (name, module) in enumerate(model.named_modules()):
        weight = getattr(module, "weight", None)
        if "norm" in name and isinstance(weight, torch.nn.Parameter) and weight.dim() == 1:
            with torch.no_grad():
                weight += 0.3 * torch.randn(weight.shape, generator=seeded(i))
