"""Changes of the batch, for every kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    return x.copy_(new) if new.shape == x.shape else new
