"""Every kernel that runs here computes what three loops do."""

import math

import naive
import pytest
import torch

import kvplug
from kvplug.kernels.base import Kernel
from kvplug.registry import REGISTRIES
from kvplug.testing import KernelConformance
from kvplug.testing.kernel import dense_of, random_stored
from kvplug.testing.tools import normal


def kernels():
    """Every registered kernel that resolves on this machine, `auto` as what it resolves to."""
    for name in REGISTRIES["kernel"].names():
        try:
            yield name, REGISTRIES["kernel"].get(name)().resolve()
        except ImportError:
            continue


KERNELS = dict(kernels())


class TestKernels(KernelConformance):
    @pytest.fixture(params=sorted({k.name for k in KERNELS.values()}))
    def kernel(self, request):
        return next(k for k in KERNELS.values() if k.name == request.param)


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("N", [0, 1, 2])
def test_against_three_loops(name, kind, N):
    B, H, G, S, Dk, Dv = 2, 2, 2, 2, 8, 8
    codec = kvplug.parse("int8(block=8)").codec
    stored = random_stored(codec, B=B, H=H, N=N, R=3, F=2, Dk=Dk, Dv=Dv, skip=3, seed=N)
    T = stored.length
    assert 2 + 3 + N * 8 - (3 if N else 0) == T
    query = normal(B, H * G, S, Dk, seed=1)
    bools = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(N)) < 0.5
    added = torch.where(bools, 0.5, -math.inf)
    mask = {"bool": bools, "additive": added}.get(kind)

    def visible(b, h, s, t):
        if kind == "causal":
            return 0.0 if t <= s else -math.inf
        if kind == "bool":
            return 0.0 if bools[b, 0, s, t] else -math.inf
        return float(added[b, 0, s, t]) if kind == "additive" else 0.0

    keys, values = dense_of(stored)
    expected, lse = naive.attention(query, keys, values, visible, Dk**-0.5)
    out, out_lse = KERNELS[name].attend(query, stored, mask, None, kind == "causal")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_the_suite_sees_a_wrong_kernel():
    """A kernel that forgets the scale, or the mask, or the hidden tokens, is found out."""

    class Wrong(Kernel):
        name = "wrong"

        def attend(self, query, stored, mask, scale, is_causal):
            return KERNELS["reference"].attend(query, stored, None, scale, False)

    with pytest.raises(AssertionError):
        KernelConformance().test_query_that_sees_nothing(Wrong())
    stored = random_stored(kvplug.parse("int8(block=8)").codec)
    with pytest.raises(AssertionError):
        KernelConformance().check(Wrong(), normal(1, 4, 2, 16, seed=1), stored, is_causal=True)


def test_auto_resolves_to_a_kernel_that_runs():
    resolved = kvplug.parse("int8").kernel.resolve()
    assert resolved.name != "auto"
    assert resolved.resolve() is resolved
