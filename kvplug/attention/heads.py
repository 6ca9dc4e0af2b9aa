"""Heads of one layer in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor


class Heads:
    """The stored heads of a layer, those with equal labels in one group.

    groups: the numbers of each group's heads, rising; groups in the order of their first heads.
    """

    def __init__(self, labels: Sequence[Hashable]) -> None:
        """Take one label for each head."""
        found: dict[Hashable, list[int]] = {}
        for head, label in enumerate(labels):
            found.setdefault(label, []).append(head)
        self.count, self.groups = len(labels), list(found.values())
        joined = [head for group in self.groups for head in group]
        self._back = None  # where groups follow one another as the heads do
        if joined != sorted(joined):
            self._back = [joined.index(head) for head in range(self.count)]

    def of(self, x: Tensor, group: int) -> Tensor:
        """What x [B, n * H, ...] has for the heads of a group, n each: a view where it can be."""
        heads = self.groups[group]
        first, last = heads[0], heads[-1]
        grouped = x.unflatten(1, (self.count, -1))
        if last - first + 1 == len(heads):
            return grouped[:, first : last + 1].flatten(1, 2)
        return grouped[:, heads].flatten(1, 2)

    def join(self, xs: list[Tensor]) -> Tensor:
        """The inverse: what each group has, [B, n * its heads, ...], as [B, n * H, ...]."""
        x = torch.cat(xs, dim=1)
        if self._back is None:
            return x
        return x.unflatten(1, (self.count, -1))[:, self._back].flatten(1, 2)
