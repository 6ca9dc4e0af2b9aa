"""Changes of the batch, for every kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import Mismatch
from .buffer import lasting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class RowOperations:
    """transformers' batch operations, by one `_map` over all tensors [B, ...] of a layer."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam_idx [B]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`: positions or a mask."""
        self._map(lambda x: x[indices.to(x.device)])


def rebatch(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of x, in place where B stays: a compiled graph knows the address."""
    new = change(x)
    if new.shape == x.shape:
        return x.copy_(new)
    with lasting():
        return new.clone() if new.is_inference() else new


def check_alike(held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Raise Mismatch where new keys and values [B, H, S, D] cannot stand beside those held."""
    for i, side in enumerate(("keys", "values")):  # asked in every layer of every step
        old, x = held[i], new[i]
        have, get = old.shape, x.shape
        if (
            have[0] == get[0]
            and have[1] == get[1]
            and have[-1] == get[-1]
            and old.dtype == x.dtype
            and old.device == x.device
        ):
            continue
        for what, a, b in (
            ("batch size", have[0], get[0]),
            ("heads", have[1], get[1]),
            ("head_dim", have[-1], get[-1]),
            ("dtype", old.dtype, x.dtype),
            ("device", old.device, x.device),
        ):
            if a != b:
                raise Mismatch(
                    f"this cache holds {side} of {what} {a} and cannot take {side} of {what} {b}: "
                    "reset it, or build another; batch_select_indices and batch_repeat_interleave "
                    "change the rows of what it holds"
                )
