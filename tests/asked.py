"""Calls of `generate` beside a store: their tokens and scores, to be compared bit for bit."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from kvplug.testing.tools import left_padded, prompt, same


class Seen(LogitsProcessor):
    """Keeps the scores of each step, without the cache that `return_dict_in_generate` returns."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def answer(model, inputs, spec=None, store=None, **kwargs):
    """Tokens and scores of one call."""
    seen, config = Seen(), None if store is None else {"chunk": 16, **store}
    tokens = model.generate(
        **inputs,
        **{"max_new_tokens": 6, "do_sample": False} | kwargs,
        cache_implementation=spec,
        cache_config=config,
        logits_processor=LogitsProcessorList([seen]),
    )
    return tokens, torch.stack(seen.scores)


def equal(a, b):
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def rows(*lengths):
    return left_padded([prompt(n, seed=n)[0] for n in lengths])
