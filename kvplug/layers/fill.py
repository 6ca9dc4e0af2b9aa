"""Layers that are filled without a model, for their size or for their speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.functional import scaled_dot_product_attention

from .base import AttentionLayer

if TYPE_CHECKING:
    from torch import Tensor


def attend_and_settle(layer: Any, keys: Tensor, visible: tuple[Tensor, Tensor], heads: int) -> None:
    """What follows `update` in a forward pass; nothing where a layer is not ours.

    A method that chooses by queries sees the keys of one head, a channel further: random where they
    are, without data where they have none.

    Args:
        layer: which took the tokens.
        keys: of these, [B, H, S, Dk].
        visible: what `update` returned.
        heads: of the queries.
    """
    if not isinstance(layer, AttentionLayer):
        return
    if layer.strategy.retention.queries:
        query = keys[:, :1].roll(1, -1).expand(-1, heads, -1, -1)
        causal = keys.shape[2] > 1
        scaled_dot_product_attention(query, *visible, is_causal=causal, enable_gqa=True)
    layer.settle()
