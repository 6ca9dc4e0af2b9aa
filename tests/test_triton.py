"""The Triton kernel: on CUDA, else interpreted on the CPU; and compiled for CUDA without a device.

Triton decides when it is imported whether it interprets, for a whole process: the tests that run
the kernel do so in a second one, which `test_interpreted` starts where there is no CUDA.
"""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvplug
from kvplug.codecs.rotated import Int8
from kvplug.kernels.reference import Reference
from kvplug.testing import KernelConformance
from kvplug.testing.kernel import expected_attention, random_stored
from kvplug.testing.tools import assert_close, normal, seeded

triton = pytest.importorskip("triton", reason="the kernel is written in triton")
import kvplug.kernels.triton as package  # noqa: E402
from kvplug.kernels.triton import attend as kernels  # noqa: E402
from kvplug.kernels.triton import sizes  # noqa: E402

INTERPRETED = package.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA here: interpreted in the process that test_interpreted starts",
)
compiles = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled where it is interpreted")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests run here")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class OnDevice(package.Triton):
    """The kernel, given tensors of the CPU: the suite has no others."""

    def attend(self, query, stored, mask, scale, is_causal):
        def move(x):
            return x if x is None else x.to(DEVICE)

        there = dataclasses.replace(
            stored,
            head=stored.head and tuple(map(move, stored.head)),
            blocks={name: move(x) for name, x in stored.blocks.items()},
            tail=tuple(map(move, stored.tail)),
        )
        out, lse = super().attend(move(query), there, move(mask), scale, is_causal)
        return out.cpu(), lse.cpu()


@pytest.fixture
def kernel():
    return OnDevice()


@runs
class TestTriton(KernelConformance):
    @pytest.fixture
    def kernel(self):
        return OnDevice()


def coded(spec):
    return kvplug.parse(spec).codec


def check(kernel, query, stored, mask=None, is_causal=False):
    return KernelConformance().check(kernel, query, stored, mask, None, is_causal)


class Launches:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@runs
@pytest.mark.parametrize(
    ("codec", "masked"),
    [("int8(block=8)", True), ("int4(block=16)", False), ("exact(block=8)", True)],
)
def test_shares_of_the_columns_merge(monkeypatch, kernel, codec, masked):
    """However many programs share the columns, and where some of them see nothing."""
    stored = random_stored(coded(codec), N=6, R=70, F=3, skip=5)
    query = normal(1, 4, 2, 16, seed=1)
    mask = None
    if masked:
        mask = torch.ones(1, 1, 2, stored.length, dtype=torch.bool)
        mask[..., 0, :40] = False
        mask[..., 1, :] = False
    outs, splits = [], []
    for steps in (1, 3, 10**6):
        attend = Launches(kernels.attend)
        monkeypatch.setattr(sizes, "STEPS", steps)
        monkeypatch.setattr(sizes, "PROGRAMS", 10**6)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "attend", attend)
            outs.append(check(kernel, query, stored, mask))
        splits.append(attend.grids[0][2])
    assert splits[0] > splits[1] > splits[2] == 1
    for out, lse in outs[:2]:
        assert_close(out, outs[2][0])
        assert_close(lse.exp(), outs[2][1].exp())


CODECS = [
    "int8",
    "int4",
    "int(k_bits=2, v_bits=2)",
    "int(k_bits=8, v_bits=4)",
    "int(k_bits=4, v_bits=2)",
    "int3",
    "int(k_bits=5, v_bits=6)",
    "exact",
]
HEADS = [
    (64, 64, torch.float16),
    (80, 80, torch.bfloat16),
    (128, 128, torch.bfloat16),
    (128, 96, torch.float32),
]


@runs
@pytest.mark.parametrize(
    ("codec", "Dk", "Dv", "dtype"),
    [(codec, *heads) for i, codec in enumerate(CODECS) for heads in HEADS[i % 2 :: 2]],
)
def test_default_blocks(kernel, codec, Dk, Dv, dtype):
    """Blocks of 64 tokens, groups of 32 channels, common head dims, a mask of the query's dtype.

    Each codec with half of the head dims, in turn.
    """
    stored = random_stored(coded(codec), N=2, R=3, Dk=Dk, Dv=Dv, skip=7, dtype=dtype, seed=Dk)
    mask = torch.rand(1, 1, 1, stored.length, generator=seeded(Dk)) < 0.7
    mask = torch.where(mask, 0.5, torch.finfo(dtype).min).to(dtype)
    check(kernel, normal(1, 6, 1, Dk, seed=1, dtype=dtype), stored, mask)


@runs
@pytest.mark.parametrize("codec", ["int8(block=128)", "int(block=256, k_bits=8)", "exact(block=5)"])
def test_other_blocks(kernel, codec):
    """Larger than what is unpacked at once, and not a power of two."""
    stored = random_stored(coded(codec), N=2, R=1, H=1, Dk=32, Dv=32, skip=4)
    check(kernel, normal(1, 2, 1, 32, seed=1), stored)


@runs
@pytest.mark.parametrize("codec", ["int8(block=8)", "exact(block=8)"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_queries(kernel, codec, is_causal):
    """More rows than one program takes, the last tile not full."""
    stored = random_stored(coded(codec), N=3, R=50, F=2, skip=3)
    check(kernel, normal(1, 6, 50, 16, seed=1), stored, is_causal=is_causal)


@runs
def test_query_masked_by_the_lowest_number(kernel):
    """Additive masks of finfo.min are not -inf: a row of them attends to all, as in torch."""
    stored = random_stored(coded("int8(block=8)"), N=1, R=3)
    lowest = torch.finfo(torch.float32).min
    _, lse = check(kernel, normal(1, 4, 1, 16, seed=1), stored, torch.full((1, 11), lowest))
    assert lse.isfinite().all()


@runs
@pytest.mark.parametrize("codec", ["int8(block=8)", "int4(block=8)", "exact(block=8)"])
def test_pieces_of_larger_buffers(kernel, codec):
    """Blocks and tokens are slices along axis 2 of tensors with room; rows may be transposed."""
    B, H = 2, 2
    stored = random_stored(coded(codec), B=B, H=H, N=3, R=5, F=2, skip=2)

    def roomy(x):
        room = torch.full((B, H, x.shape[2] + 4, *x.shape[3:]), 77, dtype=x.dtype)
        room[:, :, 3:-1] = x
        return room[:, :, 3:-1]

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    sliced = dataclasses.replace(
        stored,
        head=tuple(map(transposed, stored.head)),
        blocks={name: roomy(x) for name, x in stored.blocks.items()},
        tail=tuple(map(roomy, stored.tail)),
    )
    query = normal(B, 3, 2 * H, 16, seed=1).transpose(1, 2)
    mask = torch.rand(stored.length, 3, generator=seeded(1)).t()
    out, _ = check(kernel, query, sliced, mask)
    expected, _ = expected_attention(query, stored, mask, None, False)
    assert_close(out, expected)


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [1, 10**6])
def test_what_is_not_a_number_is_not_hidden(monkeypatch, kernel, bad, steps):
    monkeypatch.setattr(sizes, "STEPS", steps)
    stored = random_stored(coded("int8(block=8)"))
    stored.tail[0][:, :, 2, 3] = bad
    query = normal(1, 4, 1, 16, seed=1)
    outs = [k.attend(query, stored, None, None, False)[0] for k in (Reference(), kernel)]
    assert outs[1].isnan().any()
    assert torch.equal(outs[0].isnan(), outs[1].isnan())


@runs
def test_large_batch(kernel):
    stored = random_stored(coded("int4(block=8)"), B=64, H=1, N=1, R=1, skip=1)
    mask = torch.rand(64, 1, 1, stored.length, generator=seeded(1)) < 0.7
    check(kernel, normal(64, 2, 1, 16, seed=1), stored, mask)


@runs
def test_masks_are_not_copied(monkeypatch, kernel):
    """A mask is read where it is, however it broadcasts."""
    stored = random_stored(coded("int8(block=8)"), B=2)
    seen = []
    strided = package._strided
    monkeypatch.setattr(
        package, "_strided", lambda x, *a, **k: seen.append(x) or strided(x, *a, **k)
    )
    mask = torch.zeros(stored.length, device=DEVICE)
    kernel.attend(normal(2, 4, 3, 16, seed=1), stored, mask, None, False)
    assert mask.data_ptr() in [x.data_ptr() for x in seen]


def test_refuses():
    class Other(Int8):
        name = "other"

        def decode_side(self, data, side):
            return super().decode_side(data, side)

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for spec in ("int8", "int4", "k8v4", "int3", "exact"):
        assert package.Triton().refuses(coded(spec)) is None
        assert package.Triton().refuses(coded(spec), gpu, torch.bfloat16) is None
    reads = (
        "reads blocks of the formats plain, affine, rotated, rotated_planes; 'other' has a format "
        "of its own"
    )
    assert package.Triton().refuses(Other()) == reads
    refusal = package.Triton().refuses(coded("int8"), gpu, torch.float64)
    assert refusal == "reads float32, float16 and bfloat16, not torch.float64"
    refusal = package.Triton().refuses(coded("int8"), cpu)
    needs = "needs a CUDA device, not 'cpu' (TRITON_INTERPRET=1 interprets it)"
    assert refusal == (None if INTERPRETED else needs)


class NoDevice:
    """What Triton asks about the device, to compile for an H100 or H200 that is not there."""

    def get_current_device(self):
        return -1

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that is compiled where it would be launched; they are collected in `all`."""

    def __init__(self, kernel, into):
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.into.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return launch


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no compiler for CUDA")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(type(triton.runtime.driver), "active", NoDevice())
    launched = []
    for name in ("attend", "merge"):
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), launched))
    return launched


@compiles
@pytest.mark.parametrize(
    ("codec", "dtype", "S", "kind"),
    [
        ("int8", torch.bfloat16, 1, "none"),
        ("int4", torch.float16, 1, "additive"),
        ("int(k_bits=6, v_bits=3)", torch.bfloat16, 1, "none"),
        ("int(k_bits=8, v_bits=2)", torch.float32, 32, "bool"),
        ("exact", torch.bfloat16, 32, "causal"),
    ],
)
def test_compiles_for_cuda(compiled, codec, dtype, S, kind):
    """For Hopper, in the shared memory of smaller devices; once for all lengths."""
    query = normal(1, 8, S, 128, seed=1, dtype=dtype)
    for N, R, F in ((6, 70, 3), (7, 71, 4)):
        stored = random_stored(coded(codec), N=N, R=R, F=F, Dk=128, Dv=128, dtype=dtype)
        shape = (1, 1, S, 16 * stored.length)
        mask = {
            "additive": torch.zeros(shape, dtype=dtype),
            "bool": torch.ones(shape, dtype=torch.bool),
        }.get(kind)
        if mask is not None:
            mask = mask[..., : stored.length]
        package.Triton().attend(query, stored, mask, None, kind == "causal")
    once = len(compiled) // 2
    assert compiled[:once] == compiled[once:]
    assert all(k.metadata.shared <= 99 * 1024 for k in compiled)
