"""What lossy strategies cost on the real model, by the harness's own protocol."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import kvplug
from evals.setup.control import Broken
from kvplug.compat import cache_argument

WINDOW, CHUNK, SKIP = 512, 64, 128
FAR = 20_000  # tokens; the model is trained to 8,192


@torch.no_grad()
def log_probs(model, tokens, cache):
    """Next-token log-probabilities [T, V] of one window, fed in chunks through a cache."""
    found = []
    for i, chunk in enumerate(tokens.split(CHUNK)):
        unread = (i + 1) * CHUNK <= SKIP
        kept = {"logits_to_keep": 1} if unread else {}
        logits = model(chunk[None], **kept, **cache_argument(cache)).logits[0]
        found += [] if unread else [logits]
    return torch.cat(found).log_softmax(-1)[:-1]


@pytest.fixture(scope="module")
def exact(real, text):
    return log_probs(real[0], text[:WINDOW], DynamicCache(config=real[0].config))


def kl(exact, q):
    return float((exact.exp() * (exact - q)).sum(-1).mean())


@pytest.mark.parametrize(("spec", "most"), [("int8", 2e-5), ("int4", 0.002)])
def test_kl_to_the_exact_cache_is_small(real, text, exact, spec, most):
    cache = kvplug.build(spec, real[0].config)
    assert 0 < kl(exact, log_probs(real[0], text[:WINDOW], cache)) <= most
    assert cache.stats()["materialised"] == {}


def test_a_broken_codec_shows(real, text, exact):
    """The negative control: without it, a small KL could mean that nothing was encoded."""
    cache = Broken().build(real[0].config, WINDOW)
    assert kl(exact, log_probs(real[0], text[:WINDOW], cache)) > 0.2


@torch.no_grad()
def test_sinks_stay_sane_beyond_the_trained_length(real, text):
    """Left at position 0, sinks ruin the model: 9.7 nats at 20,000, not yet at 8,192; turned, 3.3.

    The way there does not go through the model: layers are given what they hold again and again,
    which the text that follows has driven out before it is read.
    """
    model, _ = real
    cache, step = kvplug.build("sinks(sinks=4, window=252)", model.config), 256
    losses, sizes = [], []
    for i in range(7):
        if i == 3:
            for layer in cache.layers:
                keys, values = layer.keys[:, :, 4:].clone(), layer.values[:, :, 4:].clone()
                while layer.get_seq_length() < FAR:
                    layer.update(keys, values)
        begin, read = step * i, i in (1, 2, 5, 6)
        given = text[None, begin : begin + step]
        logits = model(given, logits_to_keep=0 if read else 1, **cache_argument(cache)).logits[0]
        if read:
            losses.append(cross_entropy(logits, text[begin + 1 : begin + step + 1]))
        sizes.append(cache.nbytes())
        assert cache.held() <= 255
    assert cache.get_seq_length() >= FAR + 4 * step > model.config.max_position_embeddings
    early, late = torch.stack(losses).split(2)
    assert late.mean() < early.mean() + 0.5  # other text, same order
    assert max(sizes[2:]) <= sizes[1] * 1.01


@pytest.mark.parametrize(("spec", "most"), [("int8", 0.56), ("int4", 0.32)])
def test_bytes_held_against_a_bfloat16_dynamic_cache(real, spec, most):
    config, length = real[0].config, 2048
    key = torch.randn(1, config.num_key_value_heads, length, config.head_dim).bfloat16()
    cache = kvplug.build(spec, config)
    for layer in cache.layers:
        layer.update(key, key)
        layer.settle()  # no attention is going to read them
    assert cache.nbytes() <= most * len(cache.layers) * 2 * key.nbytes
