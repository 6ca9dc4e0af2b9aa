"""Every two choices meet, and few rows do it."""

from itertools import combinations, product

import pytest

from kvplug.testing.pairs import pairwise

AXES = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": [1, 2, 3, 4]}


def pairs(rows):
    return {pair for row in rows for pair in combinations(row.items(), 2)}


def everything(axes):
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


@pytest.mark.parametrize(
    "axes", [AXES, {"a": [1], "b": [1]}, {f"axis {i}": range(5) for i in range(8)}]
)
def test_all_pairs_are_covered_by_few_rows(axes):
    rows = pairwise(axes)
    assert all(list(row) == list(axes) for row in rows)
    if len(axes) < 8:
        assert pairs(rows) == pairs(everything(axes))
    assert pairs(rows) == {
        ((a, x), (b, y)) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b]
    }
    longest = sorted(len(x) for x in axes.values())[-2:]
    assert longest[0] * longest[1] <= len(rows) <= 2.5 * longest[0] * longest[1]
    assert rows == pairwise(axes)


def test_what_is_not_allowed_is_left_out_and_all_else_is_covered():
    """`a` 3 goes with nothing of `b`: its pairs are not to be had; the others are."""

    def allowed(row):
        return row.get("a") != 3 and not (row.get("b") == "y" and row.get("d") == 4)

    rows = pairwise(AXES, allowed)
    assert rows
    assert all(allowed(row) for row in rows)
    assert pairs(rows) == pairs(row for row in everything(AXES) if allowed(row))


def test_rows_that_are_wanted_come_first_and_count():
    wanted = pairwise(AXES)[3:6]
    rows = pairwise(AXES, first=wanted)
    assert rows[:3] == wanted
    assert pairs(rows) == pairs(everything(AXES))
    assert len(rows) <= len(pairwise(AXES)) + 2
