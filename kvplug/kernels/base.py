"""The contract of a kernel: attention over a layer as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..stored import Stored


@dataclass(frozen=True)
class Kernel(Stage):
    """Softmax attention over pinned tokens, encoded blocks and tail, without a dense copy."""

    kind: ClassVar[str] = "kernel"

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

    def resolve(self) -> Kernel:
        """The kernel that runs: itself; `auto` chooses."""
        return self
