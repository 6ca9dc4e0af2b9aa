"""Every built-in codec keeps the contract, and what only the integer codecs promise."""

import pytest
import torch

import kvplug
from kvplug.codecs import quantize
from kvplug.codecs.rotated import Int8
from kvplug.kernels.numba import Numba
from kvplug.testing import CodecConformance, check_golden
from kvplug.testing.affine import Affine
from kvplug.testing.specs import BUILTIN

SPECS = [
    *(f"{name}(block=8)" for name in BUILTIN["codec"]),
    "int(block=16, group=16, k_bits=4, v_bits=2)",
    "int(block=8, k_bits=4, v_bits=8)",
    "int(block=8, k_bits=3, v_bits=5)",
    "int(block=8, k_bits=6, v_bits=3)",
    "int4",
]


# a group is a token's channels: one that is large takes the bits of the others
BIASED = ("quanto", "hqq")


class TestCodecs(CodecConformance):
    @pytest.fixture(params=[x for x in SPECS if not x.startswith(BIASED)])
    def codec(self, request):
        return kvplug.parse(request.param).codec


class TestCodecsPerToken(CodecConformance):
    key_bias = False

    @pytest.fixture(params=["quanto(block=8)", "hqq(block=8, bits=3)"])
    def codec(self, request):
        return kvplug.parse(request.param).codec


def test_the_codec_that_kernels_are_held_to_keeps_its_format():
    CodecConformance().test_format(Affine(block=8))
    CodecConformance().test_bound_says_something(Affine(block=8))


class Halved(Int8):
    """Other bytes: what it reads is twice what `rotated` says."""

    name = "halved"

    def encode_side(self, x, side):
        return super().encode_side(x / 2, side)

    def decode_side(self, data, side):
        return 2 * super().decode_side(data, side)


class Wide(Int8):
    """Another dtype: a kernel would read its scales as float16."""

    name = "wide"

    def encode_side(self, x, side):
        return {
            n: y.float() if n == "k_scale" else y for n, y in super().encode_side(x, side).items()
        }


def test_a_codec_that_decodes_by_itself_has_no_format_of_its_parent():
    assert (Int8().format, Halved().format) == ("rotated", None)
    assert Numba().refuses(Halved()).endswith("'halved' has a format of its own")


@pytest.mark.parametrize(
    ("codec", "wrong"), [(Halved, "rotated"), (Wide, "rotated"), (Int8, "affine"), (Int8, "other")]
)
def test_the_suite_finds_a_format_that_is_not_kept(codec, wrong, monkeypatch):
    CodecConformance().test_format(Int8())
    monkeypatch.setattr(codec, "format", wrong)
    with pytest.raises(AssertionError):
        CodecConformance().test_format(codec())


GOLDEN = {"int": "int(k_bits=3, v_bits=6)"}  # where the defaults are another codec's bytes


@pytest.mark.parametrize("name", BUILTIN["codec"])
def test_golden_bytes(name, golden):
    check_golden(kvplug.parse(GOLDEN.get(name, name)).codec, **golden)


def test_every_codec_of_kvplug_has_golden_bytes(golden):
    assert {*BUILTIN["codec"]} == {path.stem for path in golden["folder"].glob("*.json")}


def test_absent_golden_bytes_are_a_failure(tmp_path):
    codec = kvplug.parse("int8").codec
    with pytest.raises(AssertionError, match="no golden bytes"):
        check_golden(codec, tmp_path)
    check_golden(codec, tmp_path, regen=True)
    check_golden(codec, tmp_path)
    text = (tmp_path / "int8.json").read_text()
    (tmp_path / "int8.json").write_text(text.replace('"base64": "', '"base64": "////', 1))
    with pytest.raises((AssertionError, RuntimeError)):
        check_golden(codec, tmp_path)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [("int8", (8, 8)), ("int4", (4, 4)), ("int3", (3, 3)), ("int2", (3, 2)), ("k8v4", (8, 4))]
    + [(f"int(k_bits={k}, v_bits={v})", (k, v)) for k, v in ((3, 5), (5, 6), (6, 3), (8, 3))],
)
def test_bits_per_element(spec, bits):
    codec = kvplug.parse(spec).codec
    x = torch.randn(1, 2, 3, codec.block, 64)
    data = codec.encode(x, x)
    held = sum(t.numel() * t.element_size() for t in data.values())
    # a float16 scale and zero per 64 tokens of a key channel, a byte per 64 channels of a value
    assert held == x.numel() * sum(bits) // 8 + x.numel() * 4 // 64 + x.numel() // 64


@pytest.mark.parametrize(("head_dim", "group"), [(80, 40), (112, 56), (96, 48), (33, 33), (16, 16)])
def test_value_group_divides_the_head(head_dim, group):
    codec = kvplug.parse("int4(block=8)").codec
    data = codec.encode(*[torch.randn(1, 1, 1, 8, head_dim)] * 2)
    assert data["v_scale"].shape[-1] == head_dim // group


def test_packing_is_as_documented():
    """Byte i holds token i in its low half and token i + block/2 in its high half."""
    codec = kvplug.parse("int4(block=8)").codec  # one channel: nothing is turned
    codes = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 15])
    data = codec.encode(codes.view(1, 1, 1, 8, 1), torch.zeros(1, 1, 1, 8, 1))
    assert data["k_codes"].flatten().tolist() == [0 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 15 << 4]


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        # the lowest 2 bits of every second token in a byte, then the highest of all eight in one
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_01_11_01, 0b00_10_00_10, 0b0111_1000]),
        # the lowest 4 bits of two tokens in a byte, then the highest of all eight in one
        (5, [1, 2, 3, 20, 5, 6, 31, 0], [0x51, 0x62, 0xF3, 0x04, 0b0100_1000]),
        # ... then the highest 2 of every second token
        (6, [1, 2, 3, 20, 5, 38, 63, 0], [0x51, 0x62, 0xF3, 0x04, 0b11_00_00_00, 0b00_10_01_00]),
    ],
)
def test_planes_are_as_documented(bits, codes, packed):
    """Codes that are the numbers themselves: one channel from 0 to 2**bits - 1 in steps of 1."""
    codec = kvplug.parse(f"int(block=8, k_bits={bits})").codec
    top = 2**bits - 1
    rows = torch.tensor([[*map(float, codes)]])
    assert {0, top} <= set(codes)
    data = codec.encode_side(rows.view(1, 1, 1, 8, 1), 0)
    assert data["k_codes"].flatten().tolist() == packed
    assert codec.decode_side(data, 0).flatten().tolist() == codes


def test_more_bits_less_error():
    x = torch.randn(1, 2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 3, 4, 5, 6, 8):
        codec = kvplug.parse(f"int(k_bits={bits}, v_bits={bits})").codec
        keys, values = codec.decode(codec.encode(x, x))
        errors.append([float((y - x).square().mean()) for y in (keys, values)])
    # the step is the range of a group by 3, 7, 15, 31, 63, 255; of few bits values are cut off
    steps = [3, 7, 15, 31, 63, 255]
    for side, least in ((0, 0.9), (1, 0.6)):
        for i in range(5):
            expected = (steps[i + 1] / steps[i]) ** 2
            assert errors[i][side] > least * expected * errors[i + 1][side]


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_the_bound_is_no_wider_than_it_must_be(name):
    """That of keys of one channel, to which turning adds nothing; of half of it, with feedback."""
    codec = kvplug.parse(name).codec
    x = torch.randn(1, 2, 64, 64, 1, generator=torch.Generator().manual_seed(0))
    data = codec.encode_side(x, 0)
    error = (codec.decode_side(data, 0) - x).abs()
    most = 0.5 if codec.feedback else 1.0
    assert 0.97 * most < (error / codec.max_error(data, 0)).max() <= most


def test_keys_and_values_have_their_own_bits():
    codec = kvplug.parse("int(k_bits=8, v_bits=2)").codec
    x = torch.randn(1, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    keys, values = codec.decode(codec.encode(x, x))
    assert (keys - x).abs().max() < 0.03 < 0.3 < (values - x).abs().max()


@pytest.mark.parametrize("spec", ["int8", "int(k_bits=3, v_bits=4)"])
def test_a_compiler_stores_the_same_bytes(spec):
    """It leaves out the cast to float16 and back: the codes must fit the scale that is stored."""
    codec = kvplug.parse(spec).codec
    x = 5 + 3 * torch.randn(1, 2, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    compiled, eager = torch.compile(codec.encode)(x, x), codec.encode(x, x)
    for name, data in eager.items():
        assert torch.equal(compiled[name], data), name


@pytest.mark.parametrize(
    "spec",
    [
        "int8(block=64, tail=0, group=64, first=4, k_bits=8, v_bits=8)",
        "int4(block=64, tail=32, group=64, first=4, k_bits=4, v_bits=4)",
        "int3(block=64, tail=32, group=64, first=4, k_bits=3, v_bits=3)",
        "int2(block=64, tail=32, group=64, first=4, k_bits=3, v_bits=2)",
        "k8v4(block=64, tail=32, group=64, first=4, k_bits=8, v_bits=4)",
    ],
)
def test_a_preset_in_full_is_that_preset(spec):
    """As records of results write it."""
    codec = kvplug.parse(spec).codec
    assert codec == kvplug.parse(codec.name).codec
    assert repr(codec) == spec


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("int8(k_bits=2)", "int(tail=0, k_bits=2, v_bits=8)"),
        ("int4(tail=8, group=16, v_bits=2)", "int(tail=8, group=16, v_bits=2)"),
        ("int2(k_bits=4, v_bits=4)", "int"),
        ("k8v4(k_bits=4)", "int"),
    ],
)
def test_a_preset_has_the_bits_of_its_name(spec, written):
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.parse(spec)
    assert str(e.value).startswith(f"{spec}: '{spec[:4]}' has ")
    assert str(e.value).endswith(f"write {written!r}")
    assert kvplug.parse(written).codec.name == "int"


def test_a_codec_that_writes_both_sides_at_once_is_told_of_sides():
    with pytest.raises(TypeError, match="Old: a codec writes encode_side and decode_side, for key"):

        class Old(kvplug.Codec):
            def encode(self, keys, values):
                return {"k": keys, "v": values}


def test_bfloat16_does_not_wrap():
    """In bf16 arithmetic x / scale reaches 255.5 for the largest: 256 would wrap to 0."""
    codec = kvplug.parse("int8(block=8)").codec
    for seed in range(20):
        x = torch.randn(1, 2, 4, 8, 32, generator=torch.Generator().manual_seed(seed))
        x = (x * 37).bfloat16()
        keys, values = codec.decode(codec.encode(x, x))
        assert (keys - x).abs().max() < 1
        assert (values - x).abs().max() < 3


def test_rounding_to_float16_is_the_same_where_it_is_compiled(monkeypatch):
    sizes = torch.exp2(torch.arange(-30.0, 21))[:, None]  # below the least and above the largest
    steps = torch.cat((torch.linspace(-1, 1, 4097), 1 + torch.arange(9) * 2.0**-12))
    x = (sizes * steps).clamp(max=quantize.F16_MAX)
    eager = quantize._round_down(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(eager, quantize._round_down(x))
    assert (eager <= x).all()
