"""What says how a tiny model is built, and the settings that many share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
NO_TOKENS = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}


@dataclass(frozen=True)
class Architecture:
    """How to build one: the config's name without `Config`, its settings, and what it is fed."""

    config: str
    settings: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    media: Callable[[Tensor], dict[str, Tensor]] | None = None  # ids -> inputs with picture, sound
    source: str = ""  # of an encoder-decoder: "text", "speech" or "wave"
    attention: str | None = None
    # whether transformers' own cache answers wrongly: what is right is then computed without one
    uncached: bool = False
    typed: bool = False  # it must be told which tokens are a picture's, in a text without any too
