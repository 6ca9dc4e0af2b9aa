"""The picture of bits against drift."""

import itertools
import xml.etree.ElementTree as ET

import made_runs as made
import pytest

from evals.report import front
from evals.rows.schema import measured

SVG = "{http://www.w3.org/2000/svg}"
MARKS = {
    "int8": (8.4, 0.00002), "k8v4": (6.6, 0.0006), "int4": (4.7, 0.0014), "int3": (3.7, 0.007),
    "hqq": (4.9, 0.016), "quanto": (4.9, 0.017), "transformers:quantized": (5.1, 0.017),
    made.EVIL: (2.9, 0.05),
}  # fmt: skip


def rows(marks):
    return [
        row
        for name, (bits, kl) in marks.items()
        for row in made.named(name, measured("bits", bits), measured("kl", kl), case=None)
    ]


def boxes(picture):
    """Left, top, right and bottom of what is drawn for strategies."""
    for text in picture.iter(f"{SVG}text"):
        if text.text in MARKS:
            x, y = float(text.get("x")), float(text.get("y"))
            yield x, y - 10, x + front.LETTER * len(text.text), y + 3


def test_every_strategy_has_a_mark_and_a_label_that_covers_no_other():
    picture = ET.fromstring(front.draw(rows(MARKS), "measured here & there"))
    assert len(list(picture.iter(f"{SVG}circle"))) == len(MARKS) - 1
    assert len(list(picture.iter(f"{SVG}polygon"))) == 1, "a cache from elsewhere"
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert set(MARKS) < set(words)
    assert "measured here & there" in words
    found = list(boxes(picture))
    assert len(found) == len(MARKS)
    for a, b in itertools.combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(x > 0 for box in found for x in box)
    assert max(box[2] for box in found) <= front.WIDTH


def test_further_left_are_fewer_bits_and_further_down_is_less_drift():
    picture = ET.fromstring(front.draw(rows({"a": (2.0, 0.1), "b": (4.0, 0.001)}), ""))
    a, b = picture.iter(f"{SVG}circle")
    zero = front.LEFT
    assert (float(b.get("cx")) - zero) == pytest.approx(2 * (float(a.get("cx")) - zero), abs=0.2)
    assert float(b.get("cy")) > float(a.get("cy"))
    (line,) = picture.iter(f"{SVG}polyline")
    assert len(line.get("points").split()) == 2


def test_it_is_drawn_on_a_ground_of_its_own_in_both_schemes():
    text = front.draw(rows(MARKS), "")
    assert text.index('class="page"') < text.index("<text")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in ("text", ".page", ".grid", ".front", ".ours", ".theirs"):
        assert f"{name} {{" in light
        assert f"{name} {{" in dark.partition("</style>")[0]
    assert text == front.draw(rows(MARKS), "")


def test_there_is_none_where_nothing_drifts():
    assert front.draw(rows({"growing": (16.0, 0.0)}), "") is None
    assert front.draw(made.named("int4", measured("kl", 0.1), case=None), "") is None
