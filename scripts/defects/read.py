"""How attention reads it, and gradients."""

from .defect import Defect

SLOW = {"NUMBA_DISABLE_JIT": "1"}  # not compiled anew for each defect
INTERPRETED = {"TRITON_INTERPRET": "1"}
ORACLE = ("tests/test_kernels.py", "-k", "reference and (dense or loops)")
PLAIN = ("tests/test_kernels.py", "-k", "numba and (loops or borders or nothing or merge)")
TRITON = ("tests/test_triton.py", "-k", "shares or many_queries or lowest or other_blocks")

DEFECTS = [
    Defect(
        "a view gives a head to the wrong queries",
        "kvplug/attention/view.py",
        "dense.repeat_interleave(self._repeats, dim=1)",
        "dense.repeat(1, self._repeats, 1, 1)",
        ("tests/test_view.py",),
    ),
    Defect(
        "a view loses the mask on the way",
        "kvplug/attention/view.py",
        "rest = mask, scale, is_causal",
        "rest = None, scale, is_causal",
        ("tests/test_view.py",),
    ),
    Defect(
        "the reference takes the default scale",
        "kvplug/kernels/reference.py",
        "(D**-0.5 if scale is None else scale)",
        "D**-0.5",
        ORACLE,
    ),
    Defect(
        "the reference forgets what it has summed",
        "kvplug/kernels/reference.py",
        "total = total * keep + weights.sum(-1, keepdim=True)",
        "total = total + weights.sum(-1, keepdim=True)",
        ORACLE,
    ),
    Defect(
        "the CPU kernel ignores a mask of booleans",
        "kvplug/kernels/numba/attend.py",
        "if byte_at(row, i) == 0:",
        "if byte_at(row, i) == 2:",
        PLAIN,
        SLOW,
    ),
    Defect(
        "the CPU kernel reads the next row of queries",
        "kvplug/kernels/numba/attend.py",
        "row_at(query.rows, b, h * G + (first + r) // S, (first + r) % S, size)",
        "row_at(query.rows, b, h * G + (first + r) % G, (first + r) % S, size)",
        PLAIN,
        SLOW,
    ),
    Defect(
        "the CPU kernel takes a neighbour's zero",
        "kvplug/kernels/numba/decode.py",
        "put(out, i, np.float32((byte_at(codes, i) >> shift) & keep) * scale + zero)",
        "put(out, i, np.float32((byte_at(codes, i) >> shift) & keep) * scale)",
        ("tests/test_kernels.py", "-k", "otherwise"),
        SLOW,
    ),
    Defect(
        "the CUDA kernel sees one column ahead",
        "kvplug/kernels/triton/attend.py",
        'tl.where(column[None, :] <= s[:, None], scores, -float("inf"))',
        'tl.where(column[None, :] <= s[:, None] + 1, scores, -float("inf"))',
        TRITON,
        INTERPRETED,
    ),
    Defect(
        "the CUDA kernel reads hidden tokens",
        "kvplug/kernels/triton/attend.py",
        "held & (token >= 0)",
        "held & (token >= -1)",
        TRITON,
        INTERPRETED,
    ),
    Defect(
        "the CUDA kernel takes another bit of a plane",
        "kvplug/kernels/triton/decode.py",
        "(token % 8).to(tl.uint8)",
        "(token % 4).to(tl.uint8)",
        ("tests/test_triton.py", "-k", "default_blocks"),
        INTERPRETED,
    ),
    Defect(
        "hidden tokens of the first block are read",
        "kvplug/attention/stored.py",
        "yield keys.flatten(2, 3)[:, :, skip:], values.flatten(2, 3)[:, :, skip:]",
        "yield keys.flatten(2, 3)[:, :, skip:], values.flatten(2, 3).roll(skip, 2)[:, :, skip:]",
        ORACLE,
    ),
    # gradients
    Defect(
        "a cache that passes no gradient says nothing",
        "kvplug/layers/growing.py",
        "if self.cuts_blocks and recorded(*new):",
        "if False and recorded(*new):",
        ("tests/test_gradients.py", "-k", "refuse"),
    ),
]
