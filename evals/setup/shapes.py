"""Models of real sizes with random weights: `--model shape:llama-1b`.

How fast a model decodes and how much its cache holds depends on shapes and dtype, not on what the
weights say; so these show speed and memory where they matter, without a download. Their drift and
their answers mean nothing. Text is read byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from evals.setup.config import ConfigError
from kvplug.errors import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "mistral-7b": {  # v0.3
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
        "vocab_size": 32768,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    "smollm2-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49152,
    },
}
COMMON = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, str]:
    """Return a model of random weights on the fastest device, a tokenizer, and what they are."""
    sizes = config(name)
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, dtype)).eval()
    return model, _bytes(), f"{name}, random weights of seed {SEED}"


def config(name: str) -> PreTrainedConfig:
    """Return the config of a shape, `shape:llama-1b`, or raise a `ConfigError` with the nearest."""
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise ConfigError(unknown("shape", name, [PREFIX + known for known in SHAPES]))
    return AutoConfig.for_model(**COMMON | SHAPES[shape])


def _bytes() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
