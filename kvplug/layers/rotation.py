"""Turning stored keys to another position, for rotary embeddings (RoPE, arXiv:2104.09864)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from ..errors import SpecError
from .probe import CannotProbe, probe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

# with these, frequencies do not depend on the length: a turn by d positions is a shift by d tokens
FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn", "proportional")


class Rotation:
    """Moves what one layer stores by a number of positions, as the model would have."""

    def __init__(self, inv_freq: Tensor, interleaved: bool = False) -> None:
        """Take how the first R channels are turned, the others are not.

        inv_freq: [R/2] radians per position, negative for a model that turns the other way.
        interleaved: channels 2i and 2i + 1 are a pair, else i and i + R/2.
        """
        self.inv_freq, self.interleaved = inv_freq.double().cpu(), interleaved
        self._shift: Tensor | None = None
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    def shift(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys [B, H, T, Dk] as if they stood `by` [B] positions later, in the dtype of keys."""
        cos, sin = self._angles(by, keys.device)
        r = cos.shape[-1]
        x = keys[..., :r].float()
        if self.interleaved:
            half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            half = torch.cat((-x[..., r // 2 :], x[..., : r // 2]), dim=-1)
        turned = (x * cos + half * sin).to(keys.dtype)
        return turned if r == keys.shape[-1] else torch.cat((turned, keys[..., r:]), dim=-1)

    def _angles(self, by: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cos and sin [B, 1, 1, R]; all layers of a step ask for the same, so one is remembered."""
        if self._shift is None or not torch.equal(self._shift, by):
            # in float64: float32 is too coarse at 1e5 positions
            angle = by.double().cpu()[:, None, None, None] * self.inv_freq  # [B, 1, 1, R/2]
            pairs = (angle, angle)
            angle = torch.stack(pairs, -1).flatten(-2) if self.interleaved else torch.cat(pairs, -1)
            self._shift, self._cos_sin = by, (angle.cos().float(), angle.sin().float())
        cos, sin = self._cos_sin
        return cos.to(device), sin.to(device)


Turn = tuple[Rotation | None, Rotation | None]  # of what a layer stores as keys and as values

_learned: dict[tuple[type, str, tuple[int, ...]], dict[int, Turn]] = {}


def turns(config: PreTrainedConfig, layers: tuple[int, ...]) -> dict[int, Turn]:
    """How each of these layers turns what it stores; None where that does not depend on position.

    Learned by what the model itself writes (`probe`), once per config: layers of one model differ,
    in frequencies or in having positions at all, and a config's words do not tell. Latent attention
    (MLA) stores the rotary part as values.

    Raises SpecError where a layer's keys at one position are no turn of those at another.
    """
    key = (type(config), config.to_json_string(use_diff=False), layers)
    if key not in _learned:
        # whatever the caller's defaults are
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            _learned[key] = _learn(config, layers)
    return copy.deepcopy(_learned[key])  # a rotation remembers angles: one per cache


def _learn(config: PreTrainedConfig, layers: tuple[int, ...]) -> dict[int, Turn]:
    model = type(config).__name__.removesuffix("Config")
    try:
        found = probe(config, layers)
    except CannotProbe as e:
        raise SpecError(
            f"'sinks' cannot tell how {model} rotates its keys: {e}; use 'window'"
        ) from e
    candidates = [
        Rotation(sign * inv_freq, interleaved)
        for inv_freq, kind in found.frequencies
        if kind in FIXED_FREQUENCIES
        for interleaved in (False, True)
        for sign in (1, -1)
    ]
    changing = sorted({kind for _, kind in found.frequencies} - {*FIXED_FREQUENCIES})
    result: dict[int, Turn] = {}
    for layer, sides in found.written.items():
        try:
            result[layer] = tuple(_turn_of(x, candidates) for x in sides)
        except LookupError:
            why = (
                f"frequencies of rope_type {', '.join(map(repr, changing))} change with length; "
                f"accepted: {', '.join(FIXED_FREQUENCIES)}; use 'window'"
                if changing
                else f"layer {layer} changes them after the turn, or turns them by frequencies "
                "that its rotary embedding does not show; use 'window'"
            )
            raise SpecError(f"'sinks' cannot re-rotate the keys of {model}: {why}") from None
    return result


def _turn_of(x: Tensor, candidates: list[Rotation]) -> Rotation | None:
    """What takes x [1, H, T, D] at position 0 to all its positions. Raises LookupError."""
    at = x[0].float().transpose(0, 1)[:, :, None]  # [T, H, 1, D]
    bound = 1e-4 * float(at.abs().max())  # angles of the model are float32
    if float((at - at.mean(-1, keepdim=True)).abs().max()) <= bound:
        raise LookupError  # a turn would not be seen
    if float((at - at[:1]).abs().max()) <= bound:
        return None
    first, by = at[:1].expand_as(at), torch.arange(len(at))
    for rotation in candidates:
        if 2 * len(rotation.inv_freq) > x.shape[-1]:
            continue
        if float((rotation.shift(first, by) - at).abs().max()) <= bound:
            return rotation
    raise LookupError
