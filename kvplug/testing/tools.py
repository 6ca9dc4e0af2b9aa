"""Tiny models, inputs and comparisons that all suites share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM

from ..attention.view import View

if TYPE_CHECKING:
    from torch import Tensor


GREEDY = {"do_sample": False, "max_new_tokens": 14}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# how far two ways to compute the same attention may differ, relative to the largest entry
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


# the same examples on every run, and no deadline on machines that are shared
DRAWN = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        # a fixture is a frozen stage or a spec: nothing of it survives an example
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        # suites are there to be inherited, by several classes of one process
        HealthCheck.differing_executors,
    ],
)


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama that answers in milliseconds; `overrides` change its config.

    Weights are drawn wide, so that next-token scores lie far apart and depend on what the cache
    holds: equal tokens then mean equal attention, not a flat model.
    """
    settings_ = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return random_model(LlamaConfig(**(settings_ | overrides)))


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal model of this config with random weights, on the CPU, ready for `generate`."""
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = None  # every run has its full length
    model.generation_config.pad_token_id = 0
    return model


def prompt(length: int, batch: int = 1, seed: int = 0, vocabulary: int = 97) -> Tensor:
    """Token ids [batch, length], none of them 0 (padding)."""
    return torch.randint(1, vocabulary, (batch, length), generator=seeded(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of ids of unlike length as one batch with padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a shape, the same for the same seed in every dtype."""
    return torch.randn(*shape, generator=seeded(seed)).to(dtype)


def dense(x: Tensor) -> Tensor:
    """What a view holds, as a plain tensor."""
    return x.stored.dense()[x._side] if isinstance(x, View) else x  # neither counted nor logged


def attended(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What `update` of a layer returns, after attention with some query has read it."""
    S = keys.shape[2]
    k, v = layer.update(keys, values)
    if isinstance(k, View):
        mask = torch.ones(S, k.shape[2], dtype=torch.bool).tril(k.shape[2] - S)
        query = keys.roll(1, -1)  # rows are independent
        torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask)
    return k, v


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw_bytes(a), raw_bytes(b))


def raw_bytes(x: Tensor) -> Tensor:
    """What is stored, as uint8 [n]."""
    return x.detach().contiguous().view(-1).view(torch.uint8) if x.numel() else x.reshape(-1)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Two ways to compute one thing agree, as far as `dtype` can."""
    bound = TOLERANCE[dtype] * max(1.0, float(expected.float().abs().max()))
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=bound)
