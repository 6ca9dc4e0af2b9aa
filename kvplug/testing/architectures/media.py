"""Models of text with pictures or sound, and what they are fed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..tools import normal
from .base import BASE, HEAD, SLIDING, Architecture

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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


def seeing(config: str, settings: dict[str, Any], media: Callable, **kwargs: Any) -> Architecture:
    """A model of text and pictures."""
    return Architecture(config, settings, "AutoModelForImageTextToText", media, **kwargs)


MEDIA = {
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
}  # fmt: skip
