"""A decoder's two caches, for models that also read an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compat import EncoderDecoderCache
from .errors import SpecError

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from .cache import Cache


class Pair(EncoderDecoderCache):
    """Self-attention's cache is ours; cross-attention's is transformers', filled once.

    transformers allows the methods below for its own `DynamicCache` alone.
    """

    self_attention_cache: Cache

    @classmethod
    def of(cls, theirs: EncoderDecoderCache, ours: Cache) -> Pair:
        """`theirs` with our cache for self-attention; what it has learnt is shared."""
        pair = cls(ours, theirs.cross_attention_cache)
        pair.is_updated = theirs.is_updated
        return pair

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the decoder's newest `-tokens_to_remove` tokens."""
        self.self_attention_cache.crop(tokens_to_remove)

    def save(self, folder: str | os.PathLike) -> None:
        """Raises SpecError: what cross-attention holds is transformers' own, and not written."""
        raise SpecError(
            f"{self.self_attention_cache.strategy}: the cache of an encoder-decoder model cannot "
            "be saved: its cross-attention would have to be computed anew from the encoder's output"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`: positions or a mask."""
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)
