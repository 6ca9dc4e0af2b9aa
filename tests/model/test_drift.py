"""What lossy strategies cost on the real model, by the harness's own protocol."""

import pytest
import torch
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument

WINDOW, CHUNK, SKIP = 2048, 64, 256


@torch.no_grad()
def log_probs(model, tokens, cache):
    """Next-token log-probabilities [T, V] of one window, fed in chunks through a cache."""
    chunks = [
        model(chunk[None], **cache_argument(cache)).logits[0] for chunk in tokens.split(CHUNK)
    ]
    return torch.cat(chunks).log_softmax(-1)[SKIP:-1]


@pytest.fixture(scope="module")
def exact(real, text):
    return log_probs(real[0], text[:WINDOW], DynamicCache(config=real[0].config))


@pytest.mark.parametrize(("spec", "most"), [("int8", 0.0005), ("int4", 0.010)])
def test_kl_to_the_exact_cache_is_small(real, text, exact, spec, most):
    cache = kvplug.build(spec, real[0].config)
    q = log_probs(real[0], text[:WINDOW], cache)
    kl = (exact.exp() * (exact - q)).sum(-1).mean().item()
    assert 0 < kl <= most
    assert cache.stats()["materialised"] == {}


def test_a_broken_codec_shows(real, text, exact):
    """The negative control: without it, a small KL could mean that nothing was encoded."""
    q = log_probs(real[0], text[:WINDOW], kvplug.build("int2(tail=0)", real[0].config))
    assert (exact.exp() * (exact - q)).sum(-1).mean() > 0.5


@torch.no_grad()
def test_sinks_stay_sane_beyond_the_trained_length(real, text):
    """Left at position 0, sinks ruin the model: perplexity 9,873 at position 20,000."""
    model, _ = real
    cache = kvplug.build("sinks(sinks=4, window=508)", model.config)
    losses, sizes = [], []
    stream = text[: 24 * 512 + 1]
    for i in range(0, len(stream) - 1, 512):
        logits = model(stream[None, i : i + 512], **cache_argument(cache)).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, stream[i + 1 : i + 513]))
        sizes.append(cache.nbytes())
        assert cache.held() <= 511
    assert cache.get_seq_length() > model.config.max_position_embeddings
    early, late = torch.stack(losses[1:9]).mean(), torch.stack(losses[-8:]).mean()
    assert late < early + 0.5  # other text, same order
    assert max(sizes[2:]) <= sizes[1] * 1.01


@pytest.mark.parametrize(("spec", "most"), [("int8", 0.56), ("int4", 0.32)])
def test_bytes_held_against_a_bfloat16_dynamic_cache(real, spec, most):
    config = real[0].config
    key = torch.randn(1, config.num_key_value_heads, WINDOW, config.head_dim).bfloat16()
    cache = kvplug.build(spec, config)
    for layer in cache.layers:
        layer.update(key, key)
    assert cache.nbytes() <= most * len(cache.layers) * 2 * key.nbytes
