"""What a model does to a key for its position, against what sinks of `sinks` do when they move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from ..compat import cache_argument
from ..factory import build
from ..layers.growing import Layer
from .shadow import Wrong

if TYPE_CHECKING:
    from torch import Tensor

DISTANCE = 11  # positions


def check_rotation(model: Any, spec: str, inputs: dict[str, Any] | None = None) -> None:
    """Raise `Wrong` unless one token's keys at two positions are related as sinks are moved.

    Alone in its text, a token is the same to every layer wherever it stands, but for its position.
    Models with learned positions are not so: there no key is turned, and none can be checked.

    Args:
        model: any that generates.
        spec: a strategy that sinks.
        inputs: of the encoder, where there is one before the decoder.

    """
    config = model.config.get_text_config(decoder=True)
    token, caches = torch.tensor([[7]]), []
    for position in (0, DISTANCE):
        cache = DynamicCache(config=config)
        where = torch.tensor([[position]])
        if inputs is None:
            fed = {"input_ids": token, "position_ids": where} | cache_argument(cache)
        else:
            both = EncoderDecoderCache(cache, DynamicCache(config=config))
            fed = inputs | {"decoder_input_ids": token, "decoder_position_ids": where}
            fed |= cache_argument(both)
        try:
            with torch.no_grad():
                model(**fed)
        except (TypeError, ValueError):
            return  # it takes no positions: it has none, or counts them itself
        caches.append(cache)
    ours = build(spec, model.config if model.config.is_encoder_decoder else config)
    for i, (layer, near, far) in enumerate(
        zip(ours.layers, *(c.layers for c in caches), strict=True)
    ):
        if not isinstance(layer, Layer) or not near.is_initialized:
            continue
        if not layer.strategy.retention.first:  # none of its sinks ever move
            continue
        for side, rotation in zip(("keys", "values"), layer.sinks.turn, strict=True):
            before, after = getattr(near, side), getattr(far, side)
            moved = before
            if rotation is not None:
                moved = rotation.shift(before, torch.tensor([DISTANCE]))
            elif not _turned(before, after):
                continue
            error = float((moved - after).abs().max() / after.abs().max())
            if error > 1e-3:
                raise Wrong(
                    f"sinks of layer {i} are moved to other {side} than the model writes there: "
                    f"{100 * error:.0f} % off"
                )


def _turned(before: Tensor, after: Tensor) -> bool:
    """Whether `after` may be `before` rotated: as long, in each head."""
    return torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-3)
