import torch

from evals.measure.clock import step
from evals.measure.fill import Filler
from evals.measure.memory import held_bytes
from evals.setup.contenders import resolve

CHOSEN = "snapkv(budget=60, every=32, window=8)+int4"


def test_a_filled_cache_is_as_one_that_was_prefilled(tiny):
    filler = Filler(tiny, 0)
    prompt = torch.randint(3, 128, (1, 144), generator=torch.Generator().manual_seed(0))
    specs = ["growing", "int8", "transformers:static", "window(length=64)", "int4+int8@0", CHOSEN]
    for contender in resolve(specs):
        filled, true = (contender.build(tiny.config, 160) for _ in range(2))
        filler.fill(filled, 1, 144)
        step(tiny, true, prompt)
        assert filled.get_seq_length() == 144
        for ours, theirs in zip(filled.layers, true.layers, strict=True):
            assert ours.keys.shape == theirs.keys.shape
            assert ours.keys.dtype == theirs.keys.dtype
        assert held_bytes(filled) == held_bytes(true)
        exact_length = contender.build(tiny.config, 144)
        filler.fill(exact_length, 1, 144)
        assert filler.stored_bytes(contender, 144) == held_bytes(exact_length)
