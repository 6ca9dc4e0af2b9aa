"""Turning stored keys to another position, for rotary embeddings (RoPE, arXiv:2104.09864)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from .errors import SpecError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor
    from transformers import PreTrainedConfig

# with these, frequencies do not depend on the length: a turn by d positions is a shift by d tokens
FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn", "proportional")


def modeling(config: PreTrainedConfig) -> ModuleType:
    """The module with the model's own code, beside that of its config."""
    return import_module(type(config).__module__.replace(".configuration_", ".modeling_"))


class Rotation:
    """Moves keys by a number of positions, in the convention of one model.

    Both the frequencies and the convention (halves or interleaved pairs) are asked of the model's
    own code rather than listed here.
    """

    def __init__(self, inv_freq: Tensor, interleaved: bool) -> None:
        """Take frequencies [R/2] for R <= head_dim rotated channels, and how they are paired."""
        self.inv_freq, self.interleaved = inv_freq.double().cpu(), interleaved
        self._shift: Tensor | None = None
        self._cos_sin: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Rotation | None:
        """The rotation of a model's full-attention layers, None where it has no rotary positions.

        Raises SpecError where it has some that cannot be undone and redone from the key alone.
        """
        parameters = getattr(config, "rope_parameters", None)
        if not parameters:
            return None
        model = type(config).__name__.removesuffix("Config")
        if getattr(config, "qk_rope_head_dim", None):
            raise SpecError(
                f"'sinks' cannot re-rotate the keys of {model}: only a part of each head is rotated"
            )
        kinds = parameters.get("full_attention", parameters)
        if kinds.get("rope_type", "default") not in FIXED_FREQUENCIES:
            raise SpecError(
                f"'sinks' cannot re-rotate the keys of {model}: "
                f"frequencies of rope_type {kinds['rope_type']!r} change "
                f"with length; accepted: {', '.join(FIXED_FREQUENCIES)}"
            )
        module = modeling(config)
        embeddings = (x for name, x in vars(module).items() if name.endswith("RotaryEmbedding"))
        embedding = next(embeddings, None)
        rotate_half = getattr(module, "rotate_half", None)
        if embedding is None or rotate_half is None:
            raise SpecError(f"'sinks' cannot tell how {model} rotates its keys; use 'window'")
        buffers = dict(embedding(config).named_buffers())
        inv_freq = buffers.get("inv_freq", buffers.get("full_attention_inv_freq"))
        if inv_freq is None:
            raise SpecError(f"'sinks' cannot find the rotary frequencies of {model}; use 'window'")
        turned = rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        layouts = {(-3.0, -4.0, 1.0, 2.0): False, (-2.0, 1.0, -4.0, 3.0): True}
        if tuple(turned) not in layouts:
            raise SpecError(f"'sinks' does not know the rotation of {model}; use 'window'")
        return cls(inv_freq, layouts[tuple(turned)])

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
