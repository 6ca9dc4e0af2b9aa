import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.errors import SpecError
from kvplug.units import UNITS, bytes_of, text_of


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GiB", 4 << 30), ("1.5 gib", 3 << 29), ("10MB", 10_000_000), ("7", 7), (512, 512)],
)
def test_sizes(text, number):
    assert bytes_of(text) == number


@pytest.mark.parametrize(
    "bad", ["", "GiB", "4XB", "-1GiB", "0", 0, -3, True, None, 1.5, "1e9"], ids=repr
)
def test_what_is_no_size_is_named(bad):
    with pytest.raises(SpecError, match=repr(bad)):
        bytes_of(bad)


@given(st.integers(1, 1 << 50))
def test_text_says_a_size_to_a_tenth_of_its_unit(number):
    text = text_of(number)
    assert abs(bytes_of(text.replace(" ", "")) - number) <= UNITS[text.split()[1]] * 0.051
