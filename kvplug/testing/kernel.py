"""The contract of a kernel: attention as torch computes it on dense tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
import torch

from ..attention.stored import Stored
from ..spec import parse

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs.base import Codec
    from ..kernels.base import Kernel
from .affine import Affine
from .codec import random_blocks
from .pairs import pairwise
from .tools import DTYPES, assert_close, normal, same, seeded


def random_stored(
    codec: Codec,
    *,
    B: int = 1,
    H: int = 2,
    N: int = 3,
    R: int = 5,
    F: int = 0,
    Dk: int = 16,
    Dv: int = 16,
    skip: int = 0,
    empty: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Stored:
    """A layer's content: F pinned tokens, N blocks less `skip` tokens, R in the tail."""
    keys, values = random_blocks(codec, B=B, H=H, N=N, Dk=Dk, Dv=Dv, dtype=dtype, seed=seed)

    def pair(n: int, salt: int) -> tuple[Tensor, Tensor]:
        return (
            normal(B, H, n, Dk, seed=seed + salt, dtype=dtype),
            normal(B, H, n, Dv, seed=seed + salt + 1, dtype=dtype),
        )

    blocks = codec.encode(keys, values) if N else {}
    return Stored(codec, pair(F, 11) if F else None, blocks, skip if N else 0, pair(R, 21), empty)


def expected_attention(
    query: Tensor, stored: Stored, mask: Tensor | None, scale: float | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, Q, S, Dv] and log-sum-exp [B, Q, S], in float64 over the dense tensors."""
    keys, values = (x.double() for x in dense_of(stored))
    G = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(G, 1) for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if stored.empty:  # nothing attends to room that is only reserved, whatever the mask says
        scores[..., -stored.empty :] = -torch.inf
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row of -inf alone: NaN
    return weights @ values, scores.logsumexp(-1)


def dense_of(stored: Stored) -> tuple[Tensor, Tensor]:
    """Decoded keys and values in column order, in float64, without help of `Stored`."""
    sides = []
    decoded = stored.codec.decode(stored.blocks) if stored.blocks else None
    for side in (0, 1):
        tail = stored.tail[side].double()
        parts = [stored.head[side].double()] if stored.head else []
        if decoded is not None:
            parts.append(decoded[side].double().flatten(2, 3)[:, :, stored.skip :])
        empty = tail.new_zeros(*tail.shape[:2], stored.empty, tail.shape[-1])
        sides.append(torch.cat([*parts, tail, empty], 2))
    return sides[0], sides[1]


# what a call may bring; `skip` is a part of a block
CALLS = {
    "dims": [(8, 8), (16, 24), (24, 16), (64, 64), (80, 80), (80, 96), (40, 8)],
    "mask": ["none", "causal", "bool", "additive", "lowered", "row", "heads"],
    "N": [0, 1, 2, 3], "R": [0, 1, 4, 9], "F": [0, 1, 3], "skip": [0, 0.4, 0.9], "empty": [0, 5],
    "B": [1, 2], "H": [1, 2, 3], "G": [1, 2, 3, 4], "S": [1, 2, 5], "dtype": DTYPES,
    "scale": [None, 0.3],
}  # fmt: skip


class KernelConformance:
    """The contract of `kvplug.Kernel`. Override the fixture `kernel`, and `codecs` it must read."""

    @pytest.fixture
    def kernel(self) -> Kernel:
        """The kernel under test."""
        raise NotImplementedError("override the fixture 'kernel'")

    @pytest.fixture
    def codecs(self) -> list[Codec]:
        """Codecs with small blocks, and with those that are used."""
        affine = [
            Affine(block=8, k_bits=8, v_bits=8), Affine(block=8, group=8), Affine(),
            Affine(block=16, k_bits=2, v_bits=2), Affine(block=128, v_bits=2),
        ]  # fmt: skip
        return affine + [
            parse(spec).codec
            for spec in (
                "exact(block=4)",
                "int8(block=8)",
                "int4(block=8, group=8)",
                "int(block=16, k_bits=2, v_bits=2)",
                "int(block=8, k_bits=8, v_bits=4)",
                "int(block=8, k_bits=3, v_bits=5)",
                "int(block=64, k_bits=6, v_bits=3)",
                "int8",
                "int4",
                "int(block=128, k_bits=4, v_bits=2)",
            )
        ]

    def check(
        self,
        kernel: Kernel,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One call against float64 over dense tensors."""
        before = {name: x.clone() for name, x in stored.blocks.items()}
        out, lse = kernel.attend(query, stored, mask, scale, is_causal)
        expected, expected_lse = expected_attention(query, stored, mask, scale, is_causal)
        assert (out.dtype, out.shape) == (query.dtype, expected.shape)
        assert (lse.dtype, lse.shape) == (torch.float32, expected_lse.shape)
        assert_close(out, expected, query.dtype)
        hidden = expected_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, hidden)
        assert not out[hidden].any()
        assert_close(lse[~hidden], expected_lse[~hidden]) if (~hidden).any() else None
        assert all(same(stored.blocks[name], x) for name, x in before.items())
        return out, lse

    def test_against_dense_attention(self, kernel: Kernel, codecs: list[Codec]) -> None:
        """Masks, query lengths, head groups and dims; pinned and hidden tokens, empty room.

        Each two choices meet in one call.
        """
        codecs = [codec for codec in codecs if kernel.refuses(codec) is None]
        for seed, row in enumerate(pairwise({"codec": codecs} | CALLS)):
            codec, N, R, F, empty = (row[x] for x in ("codec", "N", "R", "F", "empty"))
            skip = int(row["skip"] * codec.block) if N else 0
            if N * codec.block - skip + R + F + empty == 0:
                R = 1
            B, H, G, S = (row[x] for x in ("B", "H", "G", "S"))
            (Dk, Dv), dtype, kind = row["dims"], row["dtype"], row["mask"]
            stored = random_stored(
                codec, B=B, H=H, N=N, R=R, F=F, Dk=Dk, Dv=Dv, skip=skip, empty=empty, dtype=dtype,
                seed=seed,
            )  # fmt: skip
            T = stored.length
            query = normal(B, H * G, S, Dk, seed=seed + 5, dtype=dtype)
            mask = None
            if kind not in ("none", "causal"):
                shape = {"row": (1, 1, S, T), "heads": (B, H * G, S, T)}.get(kind, (B, 1, S, T))
                mask = torch.rand(shape, generator=seeded(seed)) < 0.6
                if kind in ("additive", "heads", "lowered"):
                    lowest = torch.tensor(-3.0 if kind == "lowered" else -math.inf, dtype=dtype)
                    mask = torch.where(mask, torch.zeros((), dtype=dtype), lowest)
            try:
                self.check(kernel, query, stored, mask, row["scale"], kind == "causal")
            except AssertionError as e:
                raise AssertionError(f"{row | {'seed': seed}}: {e}") from e

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
    @pytest.mark.parametrize("tail", [0, 1])
    def test_block_borders(self, kernel: Kernel, length: int, tail: int) -> None:
        """Lengths around a block, with and without a tail."""
        codec = parse("int8(block=8)").codec
        N = -(-length // 8)
        stored = random_stored(codec, N=N, R=tail, skip=N * 8 - length)
        assert stored.length == length + tail
        self.check(kernel, normal(1, 4, 1, 16, seed=1), stored)

    def test_query_that_sees_nothing(self, kernel: Kernel) -> None:
        """Zeros and -inf, never NaN; the other rows are not touched by it."""
        stored = random_stored(parse("int8(block=8)").codec, F=2)
        mask = torch.ones(1, 1, 3, stored.length, dtype=torch.bool)
        mask[:, :, 1] = False
        query = normal(1, 4, 3, 16, seed=1)
        for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            out, lse = self.check(kernel, query, stored, m)
            assert not out[:, :, 1].any()
            assert (lse[:, :, 1] == -torch.inf).all()
            assert out[:, :, ::2].any()

    def test_nothing_stored(self, kernel: Kernel) -> None:
        """No column at all: zeros and -inf."""
        stored = random_stored(parse("int8(block=8)").codec, N=0, R=0)
        out, lse = kernel.attend(normal(1, 4, 1, 16, seed=1), stored, None, None, False)
        assert out.shape == (1, 4, 1, 16)
        assert not out.any()
        assert (lse == -torch.inf).all()

    def test_large_scores(self, kernel: Kernel) -> None:
        """Scores of several hundred neither overflow nor lose the winner."""
        stored = random_stored(parse("int8(block=8)").codec, N=4, R=6)
        self.check(kernel, 200 * normal(1, 4, 2, 16, seed=1), stored)

    def test_outputs_are_their_own(self, kernel: Kernel) -> None:
        """A later call does not overwrite what an earlier one returned."""
        stored = random_stored(parse("int8(block=8)").codec)
        first, first_lse = kernel.attend(normal(1, 4, 1, 16, seed=1), stored, None, None, False)
        kept, kept_lse = first.clone(), first_lse.clone()
        kernel.attend(normal(1, 4, 1, 16, seed=2), stored, None, None, False)
        assert torch.equal(first, kept)
        assert torch.equal(first_lse, kept_lse)

    def test_partial_results_merge(self, kernel: Kernel) -> None:
        """Log-sum-exp is right: two halves merged by it give the whole."""
        codec = parse("exact(block=4)").codec
        whole = random_stored(codec, N=4, R=6)
        query = normal(1, 4, 1, 16, seed=1)
        left = dataclasses.replace(whole, tail=tuple(x[:, :, :0] for x in whole.tail))
        right = dataclasses.replace(whole, blocks={})
        parts = [kernel.attend(query, half, None, None, False) for half in (left, right)]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
        merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
        assert_close(merged, kernel.attend(query, whole, None, None, False)[0])
