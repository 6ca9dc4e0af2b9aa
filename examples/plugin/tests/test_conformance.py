"""Both stages keep kvplug's contracts, alone and in whole caches."""

import pytest
import torch
from kvplug_example.int8_shift import Int8Shift
from kvplug_example.int8_token import Int8Token
from kvplug_example.keynorm import KeyNorm
from kvplug_example.lookback import LookBack

from kvplug import Candidates
from kvplug.testing import CodecConformance, RetentionConformance, StrategyConformance


class TestInt8Token(CodecConformance):
    """Encoding and decoding."""

    key_bias = False  # symmetric: a large constant in one channel costs the others their bits

    @pytest.fixture
    def codec(self):
        return Int8Token(block=8)


class TestInt8Shift(CodecConformance):
    """Encoding, decoding, and the format that it claims."""

    @pytest.fixture
    def codec(self):
        return Int8Shift(block=8)


class TestKeyNorm(RetentionConformance):
    """What is kept, and when the rest goes."""

    @pytest.fixture
    def retention(self):
        return KeyNorm(budget=12, every=4)


class TestLookBack(RetentionConformance):
    """The same for a method that looks at queries."""

    @pytest.fixture
    def retention(self):
        return LookBack(budget=12, every=4, queries=3)


class TestCaches(StrategyConformance):
    """Caches that use them, through transformers' whole API."""

    @pytest.fixture(
        params=[
            "int8_token(block=8)",
            "keynorm(budget=12, every=1)",
            "lookback(budget=12, every=4)+int8(block=8)",
            "paged(page=20)",
        ]
    )
    def spec(self, request):
        return request.param


def test_the_shortest_keys_stay():
    keys = torch.tensor([3.0, 1, 9, 2, 5, 4])[None, None, :, None].expand(1, 1, 6, 8)
    tokens = Candidates(keys, keys, torch.arange(6).expand(1, 1, 6), padding=torch.tensor([0]))
    kept = KeyNorm(budget=3, every=1).keep(tokens)
    assert kept.tokens.tolist() == [[[0, 1, 3]]]
