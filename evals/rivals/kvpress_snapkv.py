"""kvpress's SnapKVPress: 256 tokens of a prompt kept, its newest 64 vote."""

from functools import partial

from evals.rivals import _kvpress

answers = partial(_kvpress.answers, "SnapKVPress", 256)
