"""How it is stored."""

from .defect import Defect
from .read import SLOW

CODECS = ("tests/test_codecs.py", "-k", "not traces and not compiler")
STATIC = ("tests/test_static.py", "-k", "compiled_once and eager or trace")

DEFECTS = [
    Defect(
        "a block is encoded a token early",
        "kvplug/layers/growing.py",
        "n = len(self.tail) - front - (0 if self.sealing else codec.tail)",
        "n = len(self.tail) - front - max(0 if self.sealing else codec.tail - 1, 0)",
        ("tests/test_layer.py", "tests/test_strategies.py", "-k", "tail or blocks"),
    ),
    Defect(
        "keys that swing get no more bits",
        "kvplug/codecs/guard.py",
        "MOST = 2.0 ",
        "MOST = 2e9 ",
        ("tests/test_guard.py",),
    ),
    Defect(
        "keys of 8 bits are not said to swing",
        "kvplug/codecs/rotated.py",
        "return swings(turn",
        "return self.k_bits < 8 and swings(_turn",
        ("tests/test_guard.py",),
    ),
    Defect(
        "blocks that are loaded are read at the width asked for",
        "kvplug/codecs/rotated.py",
        'return self._wide(data["k_codes"].shape[-1] * 8 // self.block)',
        "return self",
        ("tests/test_guard.py", "-k", "copies or chunks"),
    ),
    Defect(
        "a scale is made for one code more",
        "kvplug/codecs/quantize.py",
        "scale = -_round_down(-(high - zero.float()) / (2**bits - 1))",
        "scale = -_round_down(-(high - zero.float()) / 2**bits)",
        CODECS,
    ),
    Defect(
        "a compiled loop forgets what a channel has lost",
        "kvplug/kernels/numba/encode.py",
        "number - lost[t] * inverse",
        "number",
        ("tests/test_encoder.py", "-k", "same_bytes and 16-3"),
        SLOW,
    ),
    Defect(
        "a compiled loop gives a group its neighbour's scale",
        "kvplug/kernels/numba/encode.py",
        "wanted = sizes[t, k]",
        "wanted = sizes[t, 0]",
        ("tests/test_encoder.py", "-k", "same_bytes and 33-3"),
        SLOW,
    ),
    Defect(
        "codes come out in another order",
        "kvplug/codecs/formats.py",
        "for shift in range(0, 8, bits)]",
        "for shift in reversed(range(0, 8, bits))]",
        CODECS,
    ),
    Defect(
        "a codec claims twice the error it makes",
        "kvplug/codecs/quantize.py",
        "return scale.float() / 2 + ",
        "return scale.float() + ",
        CODECS,
    ),
    Defect(
        "a tail of one token is dropped",
        "kvplug/attention/stored.py",
        "        if self.tail[0].shape[2]:\n            yield self.tail",
        "        if self.tail[0].shape[2] > 1:\n            yield self.tail",
        ("tests/test_kernels.py", "-k", "reference and borders"),
    ),
    Defect(
        "a compiled step encodes a token late",
        "kvplug/layers/static_coded.py",
        "due = row + 1 == R",
        "due = row + 2 == R",
        STATIC,
    ),
    Defect(
        "disk keeps blocks in memory",
        "kvplug/placement/disk.py",
        "shared=True",
        "shared=False",
        ("tests/test_placement.py", "-k", "mapped"),
    ),
]
