"""Quantizers of other packages, and 8-bit floats: that they are what they say."""

import pytest
import torch
from hqq.core.quantize import Quantizer
from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

import kvplug
from kvplug import registry
from kvplug.testing.affine import Affine
from kvplug.testing.tools import normal

ROWS = (2, 3, 2, 8, 64)  # B, H, N, block, D


@pytest.mark.parametrize(("bits", "kind"), [(4, qint4), (2, qint2)])
def test_quanto_decodes_to_what_quanto_does(bits, kind):
    """But for float16 scales, and codes that fit them."""
    x = normal(*ROWS, seed=1)
    codec = kvplug.parse(f"quanto(block=8, bits={bits})").codec
    scale, shift = MaxOptimizer()(x, kind, 0, 64)
    theirs = quantize_weight(x, kind, 0, scale, shift, 64, optimized=False).dequantize()
    ours = codec.decode_side(codec.encode_side(x, 0), 0)
    off = (ours - theirs).abs()
    assert (off < 0.01 * scale.max()).float().mean() > 0.99  # others lie between two codes
    assert off.max() < 1.02 * scale.max()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_decodes_to_what_hqq_does_of_a_block_alone(bits):
    """It stops by the error of all groups, on which a block must not depend: as good."""
    codec = kvplug.parse(f"hqq(block=8, bits={bits})").codec
    x = normal(*ROWS, seed=2)
    x[..., 5] *= 6
    codes, meta = Quantizer.quantize(
        x.flatten(0, -2), nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu"
    )
    theirs = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32}).view(ROWS)
    ours = codec.decode_side(codec.encode_side(x, 1), 1)
    mine, yours = (float((y - x).abs().pow(0.7).mean()) for y in (ours, theirs))
    assert mine == pytest.approx(yours, rel=0.02)
    off = (ours - theirs).abs().mean()
    assert float(off) < 0.1 * meta["scale"].mean()


def test_hqq_moves_the_zero():
    """What it is for: less error, where outliers count little, than the range's own grid."""
    x = normal(*ROWS, seed=3)
    x[..., 5] *= 6
    plain, errors = Affine(block=8, group=64, v_bits=3), []
    for codec in (kvplug.parse("hqq(block=8, bits=3)").codec, plain):
        errors.append((codec.decode_side(codec.encode_side(x, 1), 1) - x).abs().pow(0.7).mean())
    assert errors[0] < 0.99 * errors[1]


def test_fp8_is_as_exact_for_small_tokens_as_for_large_ones():
    codec = kvplug.parse("fp8(block=8)").codec
    x = normal(*ROWS, seed=4) * 10.0 ** torch.arange(-4, 4)[:, None]
    off = (codec.decode_side(codec.encode_side(x, 0), 0) / x - 1).abs()
    assert off.quantile(0.99) <= 2**-4
    assert off.mean() == pytest.approx(0.022, abs=0.005)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fp8", 8.5), ("quanto", 4.5), ("quanto(bits=2)", 2.5), ("hqq", 4.5), ("hqq(bits=3)", 3.5)],
)
def test_bits_per_number(name, bits):
    codec = kvplug.parse(name).codec
    x = torch.randn(1, 2, 3, codec.block, 64)
    assert sum(t.nbytes for t in codec.encode(x, x).values()) * 8 == 2 * x.numel() * bits


@pytest.mark.parametrize(("name", "module"), [("quanto", "optimum"), ("hqq", "hqq")])
def test_without_its_package_it_says_what_to_install(name, module, monkeypatch):
    def absent(target):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    table = registry.Registry("codec", "none", {name: "kvplug.codecs:gone"})
    monkeypatch.setattr(registry, "import_module", absent)
    with pytest.raises(kvplug.MissingExtra, match=rf"pip install 'kvplug\[{name}\]'"):
        table.get(name)


@pytest.mark.parametrize("name", ["fp8(tail=4)", "quanto(tail=4, bits=2)", "hqq(tail=4)"])
def test_a_block_is_encoded_once_and_read_by_the_reference_kernel(name, monkeypatch):
    cache = kvplug.build(name.replace("(", "(block=8, "), CONFIG)
    before = None
    for step in range(40):
        k, v = (normal(1, 2, 1, 16, seed=2 * step + i) for i in (0, 1))
        torch.nn.functional.scaled_dot_product_attention(k, *cache.update(k, v, 0))
        _, end, blocks = cache.layers[0].encoded()
        if before is not None:
            n = before["k_codes"].shape[2]
            assert all(torch.equal(before[x], blocks[x][:, :, :n]) for x in before)
        before = blocks and {x: y.clone() for x, y in blocks.items()}
    assert end == 32
    assert set(cache.stats()["kernels"]) == {"reference"}


CONFIG = kvplug.testing.tools.tiny_llama(num_hidden_layers=1).config
