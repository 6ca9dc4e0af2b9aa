"""The compiled loops that encode: the bytes of plain torch, on any number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvplug
from kvplug.codecs import feedback, integers
from kvplug.codecs.quantize import group_of
from kvplug.compat import cache_argument
from kvplug.kernels.numba import encoder, process
from kvplug.testing.tools import DRAWN, DTYPES, normal, prompt, same, tiny_llama

BITS = (2, 3, 4, 5, 6, 8)


def rounding(B, H, D):
    """Order and weights of queries that look mostly in a few directions."""
    queries = normal(B, 2 * H, 60, D, seed=1) @ normal(D, D, seed=2)
    return feedback.order_and_weights(feedback.turned(feedback.second_moment(queries, H)))


def both_ways(x, bits, group, order_and_weights):
    """What each way makes of the same numbers: of keys, of keys for queries, and of values."""
    for way in (None, order_and_weights):
        yield integers.keys_in_torch(x, bits, way), encoder.keys(x, bits, way)
    g = group_of(x.shape[-1], group)
    yield integers.values_in_torch(x, bits, g), encoder.values(x, bits, g)


def check(*args):
    for wanted, found in both_ways(*args):
        assert wanted.keys() == found.keys()
        for name, x in wanted.items():
            assert same(x, found[name]), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [1, 16, 33, 64, 80, 112])
def test_the_same_bytes(bits, D):
    """Of every float dtype, any shape of batch, heads and blocks, and groups of a head."""
    for dtype in DTYPES:
        for B, H, N, G, group in ((2, 3, 4, 8, 64), (1, 2, 1, 64, 16), (2, 1, 0, 16, 8)):
            x = (2 * normal(B, H, N, G, D, seed=D + G) + 1).to(dtype)
            check(x, bits, group, rounding(B, H, D))


@given(
    scale=st.floats(-40, 37),
    offset=st.sampled_from([0.0, 1.0, -600.3, 6e4, -7e4]),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**16),
)
@DRAWN
def test_the_same_bytes_of_any_size(scale, offset, bits, seed):
    """From numbers below the least of float32 to its largest; some of them zero, some alike."""
    x = normal(1, 2, 3, 16, 16, seed=seed) * 10**scale + offset
    x[0, 0, 0] = 0
    x[0, 0, 1] = x[0, 0, 1, :1]
    x[0, 1, 0, :, 3] = 0
    check(x, bits, 64, rounding(1, 2, 16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_not_finite(bits, poison):
    """The same codes; a scale or a zero that is no number has no sign to speak of."""
    x = normal(2, 2, 2, 16, 16, seed=0)
    x[1, 0, 1, 3, 5] = poison
    for wanted, found in both_ways(x, bits, 8, rounding(2, 2, 16)):
        for name, y in wanted.items():
            assert torch.equal(y.nan_to_num(), found[name].nan_to_num()), name
            assert torch.equal(y.isnan(), found[name].isnan()), name


@pytest.mark.parametrize("at_once", [1, 3 * 2 * 64 * 32, 2**20])
def test_any_number_of_threads_and_of_pieces(at_once, monkeypatch):
    monkeypatch.setattr(encoder, "AT_ONCE", at_once)
    x, before = normal(1, 3, 5, 64, 32, seed=0), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            check(x, 4, 64, rounding(1, 3, 32))
    finally:
        torch.set_num_threads(before)


def test_in_any_mode_of_torch(monkeypatch):
    """Scratch made while nothing can be recorded serves later, where something is."""
    monkeypatch.setattr(encoder, "_rooms", [])
    x = normal(1, 2, 2, 16, 16, seed=0)
    with torch.inference_mode():
        check(x, 3, 64, rounding(1, 2, 16))
    check(x.requires_grad_(), 3, 64, rounding(1, 2, 16))
    assert len(encoder._rooms[0]) == x.numel()


def test_each_loop_is_compiled_for_one_signature():
    """Numbers of another type would have it compiled again, in the midst of a prompt."""
    check(normal(1, 2, 2, 16, 16, seed=0), 3, 64, rounding(1, 2, 16))
    for function in process.SIGNATURES:
        assert len(process.compiled(function).signatures) == 1


@pytest.mark.parametrize("spec", ["int3(block=8, tail=8)", "kvplug:static+int4(block=8, tail=8)"])
def test_what_has_encoded_is_counted(spec, monkeypatch):
    """By the name of a kernel, or of torch, where Numba is not there; the blocks are the same."""
    model, told, blocks = tiny_llama(), [], []
    for _ in range(2):
        cache = kvplug.build(spec.replace("static+", "static(max_cache_len=64)+"), model.config)
        model(prompt(40), **cache_argument(cache))
        told.append(cache.stats())
        blocks.append(cache.layers[0].encoded()[2])
        monkeypatch.setattr(integers, "_loops", lambda: None)
    count = told[0]["blocks_encoded"]
    assert [x["encoders"] for x in told] == [{"numba": count}, {"torch": count}]
    for name, x in blocks[0].items():
        assert same(x, blocks[1][name]), name


def test_other_devices_and_compilers_have_plain_torch():
    codec = kvplug.parse("int4").codec
    assert codec.encoder(torch.device("cpu")) == "numba"
    assert codec.encoder(torch.device("cuda")) == codec.encoder(torch.device("meta")) == "torch"
    assert kvplug.parse("fp8").codec.encoder(torch.device("cpu")) == "torch"
