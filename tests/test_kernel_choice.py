"""Which kernel runs: the one that `auto` takes, the one that is named, or an error."""

import dataclasses

import pytest
import torch

import kvplug
from kvplug import registry
from kvplug.codecs.base import Codec
from kvplug.codecs.exact import Exact
from kvplug.codecs.formats import decode_affine
from kvplug.compat import cache_argument
from kvplug.kernels import auto
from kvplug.kernels.numba import Numba
from kvplug.kernels.reference import Reference
from kvplug.testing import tiny_llama
from kvplug.testing.affine import Affine
from kvplug.testing.kernel import random_stored
from kvplug.testing.tools import normal, prompt


@dataclasses.dataclass(frozen=True)
class Other(Codec):
    """A codec that no compiled kernel knows."""

    name = "other"
    block: int = 8
    tail: int = 0


def resolved(spec, device="cpu", dtype=torch.float32):
    strategy = kvplug.parse(spec)
    return strategy.kernel.resolve(strategy.codec, torch.device(device), dtype).name


@pytest.fixture
def choose_again():
    auto._choose.cache_clear()
    yield
    auto._choose.cache_clear()


@pytest.mark.parametrize("spec", ["int8", "int4(block=8)", "int(k_bits=8, v_bits=2)", "host"])
def test_auto_takes_the_compiled_kernel(spec):
    assert resolved(spec) == "numba"


def test_auto_says_once_why_it_takes_plain_torch(caplog, monkeypatch, choose_again):
    def missing(name):
        raise kvplug.MissingExtra("pip install 'kvplug[numba]'")

    monkeypatch.setattr(registry, "find", missing)
    for _ in range(3):
        assert auto.Auto().resolve(Exact(), torch.device("cpu"), torch.float32) == Reference()
    (record,) = caplog.records
    assert "pip install 'kvplug[numba]'" in record.getMessage()


def test_auto_leaves_unknown_codecs_and_dtypes_to_plain_torch(caplog, choose_again):
    for codec, dtype in ((Other(), torch.float32), (Exact(), torch.float64)):
        assert auto.Auto().resolve(codec, torch.device("cpu"), dtype) == Reference()
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]


def test_every_width_is_read_as_it_is_stored():
    for spec in ("int(k_bits=3, v_bits=6)", "int3", "int(k_bits=5, v_bits=8)"):
        assert resolved(spec) == "numba"


def test_a_named_kernel_runs_or_raises():
    assert resolved("int8+numba") == "numba"
    assert resolved("int8+reference") == "reference"
    with pytest.raises(kvplug.SpecError, match="runs on the CPU, not on 'cuda'"):
        resolved("int8+numba", device="cuda")
    with pytest.raises(kvplug.SpecError, match=r"not torch\.float64"):
        resolved("int8+numba", dtype=torch.float64)
    why = "'numba' reads blocks of the formats plain, .*; 'other' has a format of its own"
    with pytest.raises(kvplug.SpecError, match=why):
        kvplug.parse("int8").replace(codec=Other(), kernel=Numba())


@dataclasses.dataclass(frozen=True)
class Clipped(Codec):
    """A codec from outside: it chooses its numbers by itself and stores them as `affine`."""

    name = "clipped"
    format = "affine"
    block: int = 64
    tail: int = 0
    k_bits: int = 4
    v_bits: int = 8

    def encode_side(self, x, side):
        return Affine(v_bits=8, group=16).encode_side(x.clamp(-1, 1), side)

    def decode_side(self, data, side):
        return decode_affine(self, data, side)


def test_a_codec_from_outside_is_read_by_its_format():
    assert auto.Auto().resolve(Clipped(), torch.device("cpu"), torch.float32) == Numba()
    stored = random_stored(Clipped(), N=2, R=5, Dk=64, Dv=64, skip=3)
    query = normal(1, 4, 1, 64, seed=1)
    a, b = (k.attend(query, stored, None, None, False)[0] for k in (Reference(), Numba()))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    strategy, model = kvplug.parse("int8").replace(codec=Clipped()), tiny_llama()
    cache = kvplug.build(strategy, model.config)
    model.generate(prompt(200), **cache_argument(cache), max_new_tokens=5, do_sample=False)
    assert cache.stats()["kernels"] == {"numba": 4 * model.config.num_hidden_layers}


@pytest.mark.parametrize("spec", ["int8", "int4", "host"])
def test_decoding_runs_the_compiled_kernel(spec):
    """In `generate`, and nothing else."""
    model, cache = tiny_llama(), kvplug.build(spec, tiny_llama().config)
    model.generate(prompt(200), **cache_argument(cache), max_new_tokens=5, do_sample=False)
    assert cache.stats()["kernels"] == {"numba": 4 * model.config.num_hidden_layers}
    assert cache.stats()["materialised"] == {}


@pytest.mark.parametrize("spec", ["growing", "window(length=1040)", "sinks(sinks=4, window=1036)"])
def test_long_plain_tokens_are_read_by_the_kernel(spec):
    """Exactly what torch's attention gives; real tensors for short contexts and for autograd."""
    model = tiny_llama(max_position_embeddings=2048)
    cache, plain = (kvplug.build(spec + kernel, model.config) for kernel in ("", "+reference"))
    for c in (cache, plain):
        with torch.no_grad():
            model(prompt(1200), **cache_argument(c))
            assert c.stats()["kernels"] == {}, "prefill is torch's"
            c.logits = model(prompt(1), **cache_argument(c)).logits
    layers = model.config.num_hidden_layers
    assert (cache.stats()["kernels"], plain.stats()["kernels"]) == ({"numba": layers}, {})
    torch.testing.assert_close(cache.logits, plain.logits, atol=1e-4, rtol=1e-4)
    model(prompt(1), **cache_argument(cache)).logits.sum().backward()
    assert cache.stats()["kernels"] == {"numba": layers}
    assert cache.stats()["materialised"] == {}
