"""kvpress's ExpectedAttentionPress: 256 tokens of a prompt kept."""

from functools import partial

from evals.rivals import _kvpress

answers = partial(_kvpress.answers, "ExpectedAttentionPress", 256)
