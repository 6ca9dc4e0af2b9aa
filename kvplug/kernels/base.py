"""The contract of a kernel: attention over a layer as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import SpecError
from ..stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..attention.stored import Stored
    from ..codecs.base import Codec
    from ..spec import Strategy


@dataclass(frozen=True)
class Kernel(Stage):
    """Softmax attention over sinks, encoded blocks and tail, without a dense copy."""

    kind: ClassVar[str] = "kernel"
    differentiable: ClassVar[bool] = False  # else `backward` through the output raises
    # the formats of blocks that it reads (`codecs/formats.py`); None: all, by the codec's `decode`
    formats: ClassVar[tuple[str, ...] | None] = None

    def attend(
        self,
        query: Tensor,
        stored: Stored,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """What `scaled_dot_product_attention` gives, and the log-sum-exp of the scores.

        Args:
            query: [B, Q, S, Dk] float, Q a multiple of the H stored heads: head h is read by
                queries h*Q/H and on.
            stored: T columns.
            mask: bool (True takes part) or additive, broadcastable to [B, Q, S, T], or None.
            scale: of the scores; None: 1 / sqrt(Dk).
            is_causal: upper-left causal mask, as in torch.

        Returns:
            output [B, Q, S, Dv] in the query's dtype, log-sum-exp [B, Q, S] float32. A query that
            may see nothing gets zeros and -inf.
        """
        raise NotImplementedError

    def refuses(
        self,
        codec: Codec,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        """Why it cannot serve such blocks, device or dtype of a model, or None.

        Without device and dtype: why it can serve none.
        """
        if self.formats is None or codec.format in self.formats:
            return None
        has = f"has the format {codec.format}" if codec.format else "has a format of its own"
        return f"reads blocks of the formats {', '.join(self.formats)}; {str(codec)!r} {has}"

    def reads_plain(self, S: int, T: int) -> bool:
        """Whether it reads T plain tokens for S new ones faster than torch's own attention."""
        return False

    def reads_sinks(self, S: int, T: int) -> bool:
        """The like for T tokens of which the first are sinks: torch wants them concatenated."""
        return self.reads_plain(S, T)

    def resolve(self, codec: Codec, device: torch.device, dtype: torch.dtype) -> Kernel:
        """The kernel that runs: itself, or a SpecError with the reason; `auto` chooses."""
        if reason := self.refuses(codec, device, dtype):
            raise SpecError(f"kernel {self.name!r} {reason}; 'auto' takes one that does")
        return self

    def warmup(self) -> None:
        """Compile ahead of the first call, where there is something to compile."""

    def conflict(self, strategy: Strategy) -> str | None:
        reason = self.refuses(strategy.codec)
        return f"kernel {self.name!r} {reason}" if reason else None
