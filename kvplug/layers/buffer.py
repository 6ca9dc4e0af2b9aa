"""Room for rows of tensors: appended in place, dropped at both ends, never copied per token."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ..attention.gradients import recorded

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from ..placement.base import Place


def lasting() -> AbstractContextManager:
    """Where to make tensors that change later: those of `torch.inference_mode` may not outside."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


def resized(room: Tensor, rows: int) -> Tensor:
    """Room [B, H, rows, ...] at a new address, with what `room` [B, H, C, ...] holds, then zeros.

    As static rooms are, it is marked as one whose address compiled graphs may rely on. Where `room`
    has as many rows it stays.
    """
    if room.shape[2] == rows:
        return room
    n = min(rows, room.shape[2])
    with lasting():
        new = room.new_zeros(*room.shape[:2], rows, *room.shape[3:])
        new[:, :, :n] = room[:, :, :n]
    torch._dynamo.mark_static_address(new)
    return new


class Buffer:
    """Named tensors [B, H, C, ...] of which rows `start:end` on axis 2 are in use.

    A row is a token (keys and values as they came) or an encoded block. What `read` returned stays
    valid until the next `append`: rows move only there, and only towards the front. With `steady`
    it stays valid after that too: rows move to fresh memory only.

    Rows that autograd records are concatenated instead, so that the graph of earlier ones stays
    whole; once nothing is recorded, what is held is copied out of the graph.
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        unit: int,
        reserve: int = 0,
        steady: bool = False,
    ) -> None:
        """Grow by an eighth, at least `unit` rows, and never shrink below `reserve` rows."""
        self.place, self.device, self.unit, self.reserve = place, device, unit, reserve
        self.steady = steady
        self.tensors: dict[str, Tensor] = {}
        self.start = self.end = 0
        self._latest: tuple[tuple, dict[str, Tensor]] = ((), {})  # what `read` returned last

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return next((x.shape[2] for x in self.tensors.values()), 0)

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add rows [B, H, n, ...] at the end; amortised, a constant number of copies per row."""
        n = next(iter(rows.values())).shape[2]
        held = self.tensors.values()
        if recorded(*rows.values(), *held):
            self._concatenate(rows)
            return
        if any(x.requires_grad for x in held):
            self._reallocate(self.capacity, self.tensors)
        if self.end + n > self.capacity:
            self._make_room(n, rows)
        for name, x in rows.items():
            self.tensors[name].narrow(2, self.end, n).copy_(x)
        self.end += n

    def read(self, begin: int = 0, end: int | None = None) -> dict[str, Tensor]:
        """Rows begin:end of those in use, without copying."""
        first = self.start + begin
        n = (self.end if end is None else self.start + end) - first
        key = (first, n)
        if self._latest[0] != key:  # blocks are read many times before there is one more
            rows = {name: x.narrow(2, first, n) for name, x in self.tensors.items()}
            self._latest = (key, rows)
        return self._latest[1]

    def drop_first(self, n: int) -> None:
        """Forget the first n rows, and give memory back where more is idle than growth leaves."""
        self.start += n
        if (rows := self._fitting(len(self), self.capacity)) < self.capacity:
            self._reallocate(rows, self.tensors)

    def drop_last(self, n: int) -> None:
        """Forget the last n rows."""
        self.end -= n

    def resize(self, reserve: int) -> None:
        """Never shrink below `reserve` rows from now on, and have room for as many at once."""
        self.reserve = reserve
        if self.tensors and self.capacity != max(len(self), reserve):
            self._reallocate(max(len(self), reserve), self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, H, rows, ...] in use by `change` of it, of any B and rows."""
        self._replace({name: change(x) for name, x in self.read().items()})

    def pick(self, rows: Tensor) -> None:
        """Hold, of the rows in use, those numbered rows [B, H, n] alone, in this order."""
        B, H, n = rows.shape
        heads = torch.arange(B * H, device=rows.device).view(B, H, 1)
        of_all = rows + (heads * self.capacity + self.start)  # among B * H * capacity
        held = {name: x.flatten(0, 2) for name, x in self.tensors.items()}
        if recorded(*held.values()):
            self._replace({name: x[of_all.to(x.device)] for name, x in held.items()})
            return
        capacity = max(n, self._fitting(n, self.capacity - self.start), self.reserve)
        of_all = pad(of_all, (0, capacity - n)).flatten()  # and any row for room
        with lasting():
            self.tensors = self._room(capacity, self.tensors)
        for name, x in held.items():
            room = self.tensors[name].view(B * H * capacity, *x.shape[1:])
            torch.index_select(x, 0, of_all.to(x.device), out=room)
        self._latest = ((), {})
        self.start, self.end = 0, n

    def _replace(self, rows: dict[str, Tensor]) -> None:
        """Hold these, in no more room than before."""
        n = next((x.shape[2] for x in rows.values()), 0)
        self.load(rows, self._fitting(n, self.capacity - self.start))

    def _fitting(self, n: int, capacity: int) -> int:
        """Of room for `capacity` rows, what to keep for n: less where more is idle than growth
        leaves.
        """
        if capacity > max(n + max(2 * self.unit, n // 4), self.reserve):
            return max(n, self.reserve)
        return capacity

    def load(self, rows: dict[str, Tensor], capacity: int = 0) -> None:
        """Hold these rows, of which there may be none, in place of what is held."""
        self.clear()
        if rows:
            n = next(iter(rows.values())).shape[2]
            self._reallocate(max(n, capacity, self.reserve), rows)
            self.append(rows)

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.tensors, self.start, self.end = {}, 0, 0
        self._latest = ((), {})

    def _concatenate(self, rows: dict[str, Tensor]) -> None:
        live = self.read()
        self.tensors = {
            name: torch.cat((live[name], x) if live else (x,), dim=2) for name, x in rows.items()
        }
        self.start, self.end = 0, next(iter(self.tensors.values())).shape[2]
        self._latest = ((), {})

    def _make_room(self, n: int, rows: dict[str, Tensor]) -> None:
        live = len(self)
        if self.start >= max(n, self.unit, live // 8):  # enough idle room in front: close the gap
            if self.steady:
                self._reallocate(max(live + n, self.capacity - self.start, self.reserve), rows)
                return
            gap = self.start
            for x in self.tensors.values():
                for i in range(0, live, gap):  # pieces that do not overlap their own target
                    piece = min(gap, live - i)
                    x[:, :, i : i + piece] = x[:, :, gap + i : gap + i + piece]
            self.start, self.end = 0, live
        if self.end + n > self.capacity:
            need = live + n
            # the first rows, a prompt, take what they need
            ahead = max(self.unit, need // 8) if live else 0
            self._reallocate(max(need + ahead, self.reserve), self.tensors or rows)

    def _reallocate(self, capacity: int, like: dict[str, Tensor]) -> None:
        live = self.read()
        with lasting():
            self.tensors = self._room(capacity, like)
        self._latest = ((), {})
        for name, x in live.items():
            self.tensors[name][:, :, : len(self)] = x
        self.start, self.end = 0, len(self)

    def _room(self, capacity: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.place.empty((*x.shape[:2], capacity, *x.shape[3:]), x.dtype, self.device)
            for name, x in like.items()
        }

    def __deepcopy__(self, memo: dict) -> Buffer:
        place = copy.deepcopy(self.place, memo)
        twin = Buffer(place, self.device, self.unit, self.reserve, self.steady)
        twin.load(self.read(), self.capacity - self.start)
        return twin
