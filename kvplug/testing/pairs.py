"""A few combinations in which every two choices meet, in place of all combinations."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


def pairwise(
    axes: Mapping[str, Sequence],
    allowed: Callable[[dict[str, Any]], bool] = lambda row: True,
    first: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Rows, a value for each axis, in which each two values of two axes stand together somewhere.

    Most defects show with one choice, most others with two (Kuhn, Wallace and Gallo, 2004).
    Greedy, about as many rows as the two longest axes have pairs; the same for the same axes.

    Args:
        axes: the values of each axis, hashable and told apart by their repr.
        allowed: whether a row is to be had, asked of parts of rows too; pairs that no row has are
            left out.
        first: rows that are wanted whatever they cover.
    """
    todo = dict.fromkeys(_pairs_of(axes))
    rows = []
    for row in first:
        _add(row, rows, todo)
    while todo:
        pair = next(iter(todo))
        row = _complete(dict(pair), axes, allowed, todo) if allowed(dict(pair)) else None
        if row is None:
            del todo[pair]
            continue
        _add(row, rows, todo)
    return rows


def _add(row: dict[str, Any], rows: list, todo: dict) -> None:
    rows.append(row)
    for pair in combinations(row.items(), 2):
        todo.pop(pair, None)


def _complete(row: dict, axes: Mapping, allowed: Callable, todo: dict) -> dict[str, Any] | None:
    """The row with all axes, by values that make most new pairs; None where there is none."""
    axis = next((x for x in axes if x not in row), None)
    if axis is None:
        return {x: row[x] for x in axes}
    for value in sorted(axes[axis], key=lambda x: -_new(row, axis, x, axes, todo)):
        more = row | {axis: value}
        if allowed(more) and (done := _complete(more, axes, allowed, todo)):
            return done
    return None


def _pairs_of(axes: Mapping[str, Sequence]) -> Iterator[tuple]:
    for a, b in combinations(axes, 2):
        for x in axes[a]:
            for y in axes[b]:
                yield (a, x), (b, y)


def _new(row: dict, axis: str, value: Any, axes: Mapping, todo: dict) -> int:
    """How many pairs that are still to do `value` makes with what a row has."""
    order = list(axes).index
    return sum(
        ((other, x), (axis, value))[:: 1 if order(other) < order(axis) else -1] in todo
        for other, x in row.items()
    )
