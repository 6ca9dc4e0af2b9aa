"""A model of two layers of random weights over bytes: no download, senseless text."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend


def build() -> tuple[LlamaForCausalLM, TokenizersBackend]:
    """Model and tokenizer; on one thread, since so little work is slower on more."""
    torch.set_num_threads(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one per byte
    vocab = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = TokenizersBackend(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # sharp enough for a cache to make a difference
        eos_token_id=vocab["<end>"],
        pad_token_id=vocab["<end>"],
    )
    return LlamaForCausalLM(config).eval(), tokenizer
