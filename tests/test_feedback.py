"""Keys rounded with error feedback, for the queries that attention has shown."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvplug
from kvplug.codecs import feedback
from kvplug.compat import cache_argument
from kvplug.testing.oracle import one_layer
from kvplug.testing.tools import normal, prompt, same, tiny_llama

BITS = (2, 3, 4, 5, 6)


def looking(B, H, n, D, seed=0):
    """Queries [B, H, n, D] that look mostly in a few directions, other ones for each head."""
    wide = normal(B, H, D, D, seed=seed) * torch.linspace(3, 0.05, D)[:, None]
    return normal(B, H, n, D, seed=seed + 1) @ wide


def blocks(D=32, N=3, G=64, H=2, seed=0):
    return normal(2, H, N, G, D, seed=seed)


def score_error(codec, keys, queries, moment):
    """Mean squared error of q . k [B, H, n, N * G]."""
    decoded = codec.decode_side(codec.encode(keys, keys, moment), 0)
    off = (decoded - keys).flatten(2, 3)  # [B, H, N * G, D]
    return float((queries @ off.mT).square().mean())


@pytest.mark.parametrize("bits", BITS)
def test_scores_of_such_queries_are_nearer(bits):
    codec = kvplug.parse(f"int(k_bits={bits})").codec
    keys, queries = blocks(), looking(2, 2, 200, 32)
    moment = feedback.second_moment(queries, 2)
    others = looking(2, 2, 500, 32, seed=0)[:, :, 200:]  # of the same kind, not seen
    plain = score_error(codec, keys, others, None)
    assert score_error(codec, keys, others, moment) < 0.7 * plain


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [16, 33, 64, 80])
def test_an_error_is_at_most_a_step_whatever_the_queries(bits, D):
    codec = kvplug.parse(f"int(k_bits={bits})").codec
    keys = blocks(D)
    for queries in (looking(2, 4, 50, D), torch.zeros(2, 4, 9, D), 1e15 * looking(2, 4, 1, D)):
        data = codec.encode_keys(keys, feedback.second_moment(queries, 2))
        error = (codec.decode_side(data, 0) - keys).abs()
        assert (error <= codec.max_error(data, 0)).all()


def test_grid_is_that_without_feedback():
    codec = kvplug.parse("int3").codec
    keys = blocks()
    moment = feedback.second_moment(looking(2, 2, 99, 32), 2)
    plain, fed = codec.encode_side(keys, 0), codec.encode_keys(keys, moment)
    assert same(plain["k_scale"], fed["k_scale"])
    assert same(plain["k_zero"], fed["k_zero"])
    assert not same(plain["k_codes"], fed["k_codes"])


def test_queries_that_are_not_finite_change_nothing():
    codec = kvplug.parse("int3").codec
    keys, queries = blocks(), looking(2, 2, 99, 32)
    queries[1, 0, 5, 7] = torch.nan
    coded = codec.encode_keys(keys, feedback.second_moment(queries, 2))["k_codes"]
    plain = codec.encode_side(keys, 0)["k_codes"]
    assert same(coded[1, 0], plain[1, 0])
    assert not same(coded[1, 1], plain[1, 1])


def test_it_is_gptq():
    """Residuals through the Cholesky factor of the inverse, as the paper has it: the same codes."""
    D, top = 24, 31
    M = looking(1, 1, 300, D)[0, 0]
    M = M.T @ M
    order, weights = feedback.order_and_weights(M[None, None])
    at = order[0, 0]
    x = normal(D, 40, seed=3).double() * 3 + 15.5  # of a grid of 0, 1, ... 31
    damped = M.double() + feedback.DAMPING * M.diagonal().mean() * torch.eye(D)
    inverse = torch.linalg.inv(damped[at][:, at])
    C = torch.linalg.cholesky(inverse, upper=True)
    rest, wanted = x[at].clone(), torch.empty(D, 40, dtype=torch.double)
    for j in range(D):
        code = rest[j].round()
        code = code.clamp(x[at[j]].floor(), x[at[j]].ceil()).clamp(0, top)
        lost = (rest[j] - code) / C[j, j]
        wanted[at[j]] = code
        rest[j:] -= C[j, j:, None] * lost
    x = x.float()[None, None, None]
    ones, zeros = torch.ones(1, 1, 1, D), torch.zeros(1, 1, 1, D)
    codes = feedback.round_keys(x, ones, zeros, 5, order, weights)[0, 0, 0]
    assert (codes == wanted).float().mean() > 0.999


def filled(spec, calls, padding=(0, 3), heads=2, attend=True):
    """A layer that was given so many tokens in each call, its queries shown or not."""
    layer = one_layer(kvplug.parse(spec), torch.tensor(padding))
    keys, values = (normal(len(padding), heads, sum(calls), 16, seed=i) for i in (1, 2))
    queries = looking(len(padding), 2 * heads, sum(calls), 16)
    start = 0
    for S in calls:
        now = slice(start, start + S)
        k, v = layer.update(keys[:, :, now], values[:, :, now])
        if attend:
            sdpa(queries[:, :, now], k, v, enable_gqa=True, is_causal=start == 0)
        start += S
    return layer


def counts(layer):
    return layer.stats.blocks_encoded, layer.stats.blocks_for_queries


@pytest.mark.parametrize("spec", ["int4", "int3", "int2", "int(k_bits=6)"])
def test_a_prompt_is_rounded_for_its_queries(spec):
    codec = f"{spec[:-1]}, block=8, tail=8)" if "(" in spec else f"{spec}(block=8, tail=8)"
    layer = filled(codec, [60])
    assert counts(layer) == (6, 6)


@pytest.mark.parametrize("spec", ["int8", "k8v4"])
def test_keys_of_eight_bits_do_not_wait(spec):
    assert counts(filled(f"{spec}(block=8, tail=8)", [60])) == (6, 0)


def test_tokens_one_by_one_show_too_few_queries():
    layer = filled("int4(block=8, tail=8)", [60, *[1] * 16])
    assert counts(layer) == (8, 6)


@pytest.mark.parametrize("ask", ["update", "keys", "state"])
def test_without_attention_rounding_is_plain_at_the_next_call_or_when_asked(ask):
    layer = filled("int4(block=8, tail=8)", [60], attend=False)
    assert counts(layer) == (0, 0)
    new = normal(2, 2, 1, 16, seed=3)
    ways = {"update": lambda: layer.update(new, new), "keys": lambda: layer.keys}
    ways.get(ask, layer.state)()
    assert counts(layer) == (6, 0)


def test_what_may_be_rolled_back_is_rounded_plainly():
    layer = filled("int4(block=8, tail=8)", [4])
    layer.activate_past_recording()
    new = normal(2, 2, 56, 16, seed=3)
    k, v = layer.update(new, new)
    sdpa(normal(2, 4, 56, 16, seed=4), k, v, enable_gqa=True)
    assert counts(layer) == (0, 0)
    layer.crop(0)
    assert counts(layer) == (6, 0)


def test_rows_are_what_they_are_alone():
    """Padding shows queries too, which do not count, and rows do not meet."""
    spec = "int3(block=8, tail=0)"
    both = filled(spec, [52], padding=(0, 8))
    layer = one_layer(kvplug.parse(spec), torch.tensor([0]))
    keys, values = (normal(2, 2, 52, 16, seed=i)[1:, :, 8:] for i in (1, 2))
    k, v = layer.update(keys, values)
    sdpa(looking(2, 4, 52, 16)[1:, :, 8:], k, v, enable_gqa=True, is_causal=True)
    alone, data = layer.encoded()[2]["k_codes"][0], both.encoded()[2]["k_codes"][1, :, 1:]
    assert (alone == data).float().mean() > 0.99


@pytest.mark.parametrize("method", ["snapkv(budget=40, every=8, window=4)", "keydiff(budget=40)"])
def test_beside_methods_that_choose_by_content(method):
    layer = filled(f"{method}+int4(block=8, tail=8)", [60], padding=(0, 0))
    encoded, fed = counts(layer)
    assert encoded == fed > 0


@pytest.mark.parametrize("codec", ["int8(block=8)", "exact(block=8)+host"])
def test_a_codec_without_feedback_is_given_no_queries_of_such_a_method(codec):
    layer = filled(f"snapkv(budget=40, every=8, window=4)+{codec}", [60], padding=(0, 0))
    encoded, fed = counts(layer)
    assert (encoded > 0, fed) == (True, 0)


@pytest.mark.parametrize(("attention", "fed"), [("sdpa", 3), ("eager", 0)])
def test_attention_that_shows_no_query_is_counted(attention, fed):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    cache = kvplug.build("int4(block=8, tail=8)", model.config)
    for n in (40, 1):
        model(prompt(n), **cache_argument(cache))
    layers, stats = len(cache.layers), cache.stats()
    assert (stats["blocks_encoded"], stats["blocks_for_queries"]) == (3 * layers, fed * layers)
