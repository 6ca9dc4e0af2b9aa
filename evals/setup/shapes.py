"""Models of real sizes with random weights: `--model shape:llama-1b`.

How fast a model decodes and how much its cache holds depends on shapes and dtype, not on what the
weights say; so these show speed and memory where they matter, without a download. Their drift and
their answers mean nothing. Text is read byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from evals.setup.config import ConfigError
from kvplug.errors import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "shape:"
SEED = 0
SHAPES = {
    "llama-1b": {  # Llama 3.2
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {  # Llama 3.1
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
COMMON = {"vocab_size": 128256, "max_position_embeddings": 131072}


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, str]:
    """Return a model of random weights on the fastest device, a tokenizer, and what they are."""
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise ConfigError(unknown("shape", name, [PREFIX + known for known in SHAPES]))
    config = LlamaConfig(**SHAPES[shape], **COMMON)
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    return model, _bytes(), f"{name}, random weights of seed {SEED}"


def _bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
