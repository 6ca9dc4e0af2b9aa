"""Which widths layers take, so that all together hold as many bits as asked and lose least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .formats import PLANES, WIDTHS

if TYPE_CHECKING:
    from torch import Tensor

SECTION = "widths"  # of a calibration
BITS = tuple(sorted((*WIDTHS, *PLANES)))


def assign(kl: Tensor, numbers: Tensor, wanted: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Bits of keys and values of each layer, that hold no more than all at `wanted` would.

    kl, numbers: of `sensitivity.measure`. From the fewest bits on, greedily where a bit saves most
    KL. None of a layer that was not measured.
    """
    measured = (numbers > 0).all(-1)
    rows = [i for i, known in enumerate(measured.tolist()) if known]
    sizes = numbers.tolist()
    room = sum((bits - BITS[0]) * n for i in rows for bits, n in zip(wanted, sizes[i], strict=True))
    costs = kl.double().tolist()
    at = {(i, side): 0 for i in rows for side in (0, 1)}

    def steps() -> list[tuple[float, int, int, int, int]]:
        """KL saved per bit, what a step takes, and the step, of all that there is room for."""
        found = []
        for (i, side), now in at.items():
            for then in range(now + 1, len(BITS)):
                more = (BITS[then] - BITS[now]) * sizes[i][side]
                if more <= room:
                    saved = costs[i][side][now] - costs[i][side][then]
                    found.append((saved / more, more, i, side, then))
        return found

    while found := steps():
        saved, more, i, side, then = max(found)
        if saved <= 0:
            break
        at[i, side], room = then, room - more
    return [
        (BITS[at[i, 0]], BITS[at[i, 1]]) if known else None
        for i, known in enumerate(measured.tolist())
    ]
