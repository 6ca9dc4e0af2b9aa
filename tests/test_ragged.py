"""Heads of one layer that hold different numbers of tokens."""

import copy
import dataclasses
from itertools import cycle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache, GPT2Config

import kvplug
from kvplug import calibration
from kvplug.compat import cache_argument, output_cache
from kvplug.layers.ragged import RaggedLayer
from kvplug.retention.budgets import split
from kvplug.testing import StrategyConformance
from kvplug.testing.architectures import Absent, make
from kvplug.testing.memory import peak_bytes
from kvplug.testing.oracle import one_layer
from kvplug.testing.pairs import pairwise
from kvplug.testing.reuse import OPERATIONS
from kvplug.testing.shadow import Shadow
from kvplug.testing.specs import BUILTIN, PAIRED, SMALL
from kvplug.testing.specs import spec as spelled
from kvplug.testing.strategy import ASSISTED, CHUNKS, HEADS, MODES
from kvplug.testing.tools import (
    DTYPES,
    GREEDY,
    assert_close,
    attended,
    dense,
    left_padded,
    normal,
    prompt,
    tiny_llama,
)

NEEDS = [[0.1, 0.6, 0.3, 0.1], [0.4, 0.4, 0.05, 0.45]]  # [L, H]


@pytest.fixture
def heads(tmp_path):
    """Write needs [L, H] for a config; return the file's name."""

    def write(config, needs):
        path = tmp_path / "heads.safetensors"
        calibration.write(path, {"budgets.need": torch.as_tensor(needs)}, config, {})
        return str(path)

    return write


@pytest.fixture
def model():
    return tiny_llama(num_key_value_heads=4, num_attention_heads=8, head_dim=8)


class Alone:
    """A layer of ragged heads, and beside it one layer for each head, which holds only that."""

    def __init__(self, spec, heads, padding, needs=NEEDS[0]):
        head = kvplug.parse(spec).retention
        file = heads(GPT2Config(n_layer=1), [needs])
        self.whole = one_layer(kvplug.parse(spec, {"heads": file}), padding)
        self.budgets = split(torch.tensor([needs]), head.budget, head.least)[0]
        strategies = [
            kvplug.parse(spec).replace(retention=head.with_budget(n)) for n in self.budgets
        ]
        self.single = [one_layer(strategy, padding) for strategy in strategies]
        self.padding, self.step = padding, 0

    def update(self, S, additive=False):
        """S new tokens; attention over the whole equals that over each head's dense content."""
        B, H, G, D = len(self.padding), len(self.budgets), 2, 8
        self.step += 1
        keys, values = (normal(B, H, S, D, seed=2 * self.step + i) for i in (0, 1))
        query = normal(B, G * H, S, D, seed=-self.step)
        seen = self.whole.get_seq_length()
        length, offset = self.whole.get_mask_sizes(S)
        columns, rows = torch.arange(offset, offset + length), torch.arange(seen, seen + S)
        mask = (columns <= rows[:, None]) & (columns >= self.padding[:, None, None])
        mask = mask[:, None]  # transformers'
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        k, v = self.whole.update(keys, values)
        assert k.shape == (B, H, length, D)
        out = sdpa(query, k, v, attn_mask=mask, enable_gqa=True)
        real = rows >= self.padding[:, None]  # [B, S]
        for h, layer in enumerate(self.single):
            sees = real[:, None].expand(B, 1, S)
            if seen:
                held = layer.positions.read()["p"] >= self.padding[:, None, None]
                sees = torch.cat((held, sees), dim=-1)  # [B, 1, T]
            k, v = layer.update(keys[:, h : h + 1], values[:, h : h + 1])
            sees = sees[:, :, None] & torch.ones(S, k.shape[2], dtype=torch.bool).tril(
                k.shape[2] - S
            )
            mine = query[:, h * G : (h + 1) * G]
            wanted = sdpa(mine, dense(k), dense(v), attn_mask=sees, enable_gqa=True)
            sdpa(mine, k, v, attn_mask=sees, enable_gqa=True)  # where it is watched, it chooses now
            # queries of padding give anything
            for x in (out, wanted):
                x.masked_fill_(~real[:, None, :, None], 0)
            assert_close(out[:, h * G : (h + 1) * G], wanted)
        assert self.whole.kept() == [layer.kept()[0] for layer in self.single]
        return out

    def each(self, change):
        self.whole = change(self.whole)
        self.single = [change(layer) for layer in self.single]


SPECS = [
    "expected(budget=24, every=5, queries=6, sinks=2, recent=3)",
    "h2o(budget=24, every=5)+int8(block=8)",
    "keydiff(budget=30, every=1, recent=3)",
    "snapkv(budget=24, every=3, window=4)+int4(block=8, tail=5)+host",
    "lagkv(budget=24, every=9, lag=4, sinks=2)+exact(block=4)+disk",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("padding", [(0,), (0, 11, 4)], ids=str)
def test_heads_are_as_each_alone(spec, padding, heads):
    """What attention reads of all is what it would read of a dense layer for each head."""
    both = Alone(spec, heads, torch.tensor(padding))
    assert len(set(both.budgets)) == 3
    for i, S in enumerate((40, *[1] * 12, 7, 1, 20, *[1] * 9)):
        both.update(S, additive=i % 2 == 0)


def test_rows_change_and_copies_go_on(heads):
    spec = "h2o(budget=24, every=3)+int8(block=8)"
    both = Alone(spec, heads, torch.tensor([0, 7, 2]))
    both.update(30)
    both.update(1)

    def rows(change):
        def of(layer):
            change(layer)
            return layer

        both.each(of)

    order = torch.tensor([2, 0, 0])
    rows(lambda x: x.reorder_cache(order))
    both.padding = both.padding[order]
    both.update(1)
    rows(lambda x: x.batch_repeat_interleave(2))
    both.padding = both.padding.repeat_interleave(2)
    both.update(4)
    rows(lambda x: x.batch_select_indices(torch.tensor([1, 4, 5])))
    both.padding = both.padding[[1, 4, 5]]
    both.update(1)
    other = copy.deepcopy(both)
    other.update(9)  # leaves the original alone
    both.each(copy.deepcopy)
    both.update(9)
    rows(lambda x: x.activate_past_recording())
    both.update(9)
    rows(lambda x: x.crop(-5))
    both.update(2)
    rows(lambda x: x.deactivate_past_recording())
    both.update(3)
    twin = one_layer(both.whole.slot.strategy)
    twin.load_state(both.whole.state())
    both.whole = twin
    both.update(1)
    rows(lambda x: x.reset())
    both.padding = torch.zeros(3, dtype=torch.long)
    both.update(20)


def test_a_crop_that_one_group_cannot_do_changes_none(heads):
    spec = "keydiff(budget=16, every=20, recent=3)"
    both = Alone(spec, heads, torch.tensor([0]), NEEDS[1])
    both.update(34)
    both.update(1)
    assert both.whole.kept() == [35, 35, 5, 35]
    with pytest.raises(kvplug.Evicted):
        both.whole.crop(-20)
    assert both.whole.get_seq_length() == 35
    assert both.whole.kept() == [35, 35, 5, 35]


def test_memory_is_really_free(heads):
    """Heads hold what their budget says, and bytes are as many."""
    spec = "keydiff(budget=64, every=8, recent=3)"
    whole, equal = Alone(spec, heads, torch.tensor([0])).whole, one_layer(kvplug.parse(spec))
    keys = normal(1, 4, 600, 8, seed=0)
    sizes = []
    for layer in (whole, equal):
        for part in keys.split(20, dim=2):
            layer.update(part, part)
        sizes.append(kvplug.cache.nbytes(layer))
    assert whole.kept() == [23, 140, 70, 23]
    assert sum(whole.kept()) == sum(equal.kept()) == 4 * 64
    assert sizes[0] < 1.3 * sizes[1], "as if all were as long as the longest"


@pytest.mark.parametrize("method", ["expected(queries=6, sinks=2, recent=3", "keydiff(recent=3"])
@pytest.mark.parametrize("codec", ["", "+int8(block=8)"])
def test_generate(method, codec, model, heads):
    """Each call is dense attention over what is held; padded rows say what they say alone."""
    spec = f"{method}, budget=16, every=5, heads={heads(model.config, NEEDS)!r}){codec}"
    rows = [prompt(n, seed=n)[0] for n in (33, 9, 20)]
    batch = left_padded(rows)
    padding = (batch["attention_mask"] == 0).sum(-1)
    for more in ({}, {"num_beams": 3}):
        with Shadow(model, padding) as shadow:
            out = model.generate(**batch, cache_implementation=spec, **GREEDY, **more)
        assert shadow.attentions_checked > 0
        assert shadow.dropped > 0
        if not codec and not more:  # blocks are cut of all rows together
            for row, together in zip(rows, out, strict=True):
                alone = model.generate(row[None], cache_implementation=spec, **GREEDY)
                assert together[-14:].tolist() == alone[0, -14:].tolist()
    with Shadow(model) as shadow:
        model.generate(prompt(40), cache_implementation=spec, prompt_lookup_num_tokens=3, **GREEDY)
    assert shadow.attentions_checked > 0


def test_what_is_asked_and_kept_is_told(model, heads, tmp_path):
    file = heads(model.config, NEEDS)
    spec = f"h2o(budget=20, every=4, heads={file!r})"
    out = model.generate(
        prompt(80), cache_implementation=spec, return_dict_in_generate=True, **GREEDY
    )
    cache = output_cache(out)
    told = cache.stats()["retention"]
    assert told["asked"] == [[7, 40, 20, 7], [27, 27, 3, 30]]
    assert sum(map(sum, told["asked"])) == pytest.approx(8 * 20, abs=2)
    for asked, kept in zip(told["asked"], told["kept"], strict=True):
        assert all(n <= m < n + 4 for n, m in zip(asked, kept, strict=True))
    assert kvplug.parse(cache.stats()["strategy"]) == cache.strategy
    cache.save(tmp_path / "saved")
    again = kvplug.load(tmp_path / "saved", model)
    assert again.stats()["retention"]["kept"] == told["kept"]
    heads(model.config, [NEEDS[1], NEEDS[0]])
    with pytest.raises(kvplug.Mismatch, match="has changed since"):
        kvplug.load(tmp_path / "saved", model)


@pytest.mark.parametrize("rest", ["", "+int4(block=8, tail=0)", "+exact(block=8)+host"])
def test_what_heads_leave_is_estimated(rest, model, heads):
    spec = f"keydiff(budget=24, every=5, recent=3, heads={heads(model.config, NEEDS)!r}){rest}"
    cache = kvplug.build(spec, model.config)
    with torch.no_grad():
        model(prompt(100, batch=2), **cache_argument(cache))
    assert cache.stats()["retention"]["kept"][0] != [24] * 4
    assert kvplug.estimate(spec, model.config, context=100, batch=2) == cache.nbytes()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("keydiff(heads='nowhere')", "nowhere"),
        ("pyramid(heads={file})", "layers have budgets already"),
        ("keydiff(budget=32, heads={file})", "budget=32 leaves nothing"),
    ],
)
def test_refusals(spec, text, model, heads):
    spec = spec.format(file=repr(heads(model.config, NEEDS)))
    with pytest.raises(kvplug.SpecError, match=text):
        kvplug.build(spec, model.config)


def test_refusals_of_models(heads):
    eager = tiny_llama(attn_implementation="eager")
    spec = f"keydiff(heads={heads(eager.config, [[0.5, 0.1]] * 2)!r})"
    with pytest.raises(kvplug.SpecError, match=r"no dense tensor.*'sdpa'"):
        eager.generate(prompt(9), cache_implementation=spec, **GREEDY)
    other = tiny_llama(num_key_value_heads=4)
    with pytest.raises(kvplug.SpecError, match="num_key_value_heads"):
        kvplug.build(spec, other.config)
    same = heads(other.config, [[0.5, 0.1]] * 2)
    with pytest.raises(kvplug.Mismatch, match=r"2 stored heads.*stores 4"):
        other.generate(prompt(9), cache_implementation=f"keydiff(heads={same!r})", **GREEDY)


# ------------------------------------------------------------------------------- the suite, with it

# each codec with each placement, and each method with each of both
METHODS = [f"{SMALL[name][:-1]}, heads='any')" for name in ("expected", "h2o", "keydiff", "snapkv")]
AXES = {"retention": METHODS, "codec": PAIRED["codec"], "tail": (0, 8)}
CALIBRATED = [
    spelled({"layout": "growing"} | row)
    for row in pairwise(AXES | {"placement": BUILTIN["placement"]})
]
WAYS = [(mode, 1 if mode in ASSISTED else 2) for mode in MODES]
NUMBERS = [(heads, dtype) for heads in HEADS for dtype in DTYPES]


def each(ways):
    """Every strategy, one way for each in turn."""
    return list(zip(CALIBRATED, cycle(ways), strict=False))


class TestCalibrated(StrategyConformance):
    """The suite, as if whatever model comes had been calibrated."""

    @pytest.fixture(params=CALIBRATED[::4])
    def spec(self, request):
        return request.param

    @pytest.fixture(autouse=True)
    def calibrated(self, monkeypatch):
        def of_heads(retention, config):
            layers = len(DynamicCache(config=config).layers)
            H = 2 if isinstance(config, GPT2Config) else config.num_key_value_heads
            needs = torch.arange(layers * H).view(layers, H) * 7 % 5 + 1.0
            return split(needs, retention.budget, retention.least)

        monkeypatch.setattr("kvplug.factory.of_heads", of_heads)

    @pytest.mark.parametrize(("spec", "way"), each(WAYS))
    def test_generation(self, run, model, lossless, way):
        super().test_generation(run, model, lossless, *way)

    def test_eager_and_sdpa_agree(self, fresh):
        """They do not: heads of unlike length are no dense tensor, and `eager` is told so."""
        eager = tiny_llama(attn_implementation="eager")
        inputs = left_padded([prompt(n, seed=n)[0] for n in (30, 11)])
        with pytest.raises((kvplug.Unseen, kvplug.ViewError), match="attn_implementation='sdpa'"):
            eager.generate(**inputs, **cache_argument(fresh()), **GREEDY)

    def test_full_precision_stays_within_the_tail(self, strategy, fresh, model):
        cache = fresh()
        model.generate(prompt(40), **cache_argument(cache), **(GREEDY | {"max_new_tokens": 30}))
        for layer in cache.layers:
            for part in layer.parts:
                codec = part.strategy.codec
                if part.cuts_blocks:
                    assert 69 - part.encoded()[1] <= codec.tail + codec.block - 1

    @pytest.mark.parametrize(("spec", "way"), each(NUMBERS))
    def test_heads_and_dtypes(self, spec, lossless, way):
        super().test_heads_and_dtypes(spec, lossless, *way)

    @pytest.mark.parametrize(("spec", "chunk"), each(CHUNKS))
    def test_lengths_and_chunks(self, strategy, model, fresh, chunk):
        super().test_lengths_and_chunks(strategy, model, fresh, chunk)

    @pytest.mark.parametrize(("spec", "operation"), each(OPERATIONS))
    def test_batch_operations(self, strategy, model, fresh, operation):
        super().test_batch_operations(strategy, model, fresh, operation)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "qwen2, key bias", "falcon, multi-query"),
        *("gemma3, sliding", "falcon_h1, mamba in each layer", "qwen3_next, linear hybrid"),
    ],
)
def test_other_architectures(name, heads):
    """Biases, windows and states beside it; what each layer stores says how many heads it has."""
    try:
        model = make(name)
    except Absent as e:
        pytest.skip(str(e))
    plain = DynamicCache(config=model.config)
    model(prompt(3), **cache_argument(plain))
    stored = [getattr(x, "keys", None) for x in plain.layers]
    needs = torch.full((len(stored), 8), torch.nan)
    for row, x in zip(needs, stored, strict=True):
        if x is not None:
            row[: x.shape[1]] = torch.tensor([1.0, 4, 2, 2, 1, 1, 1, 1])[: x.shape[1]]
    file = heads(model.config, needs)
    spec = f"expected(budget=16, every=5, queries=6, sinks=2, recent=3, heads={file!r})"
    batch = left_padded([prompt(n, seed=n)[0] for n in (33, 9)])
    with Shadow(model, (batch["attention_mask"] == 0).sum(-1)) as shadow:
        model.generate(**batch, cache_implementation=spec, **GREEDY)
    assert shadow.attentions_checked > 0
    assert shadow.dropped > 0


def test_a_step_makes_no_dense_copy():
    """Of heads of several hundred tokens: it allocates masks and scores."""
    strategy = kvplug.parse("keydiff(budget=600, every=60, heads='any')+int8(block=8, tail=8)")
    slot = one_layer(strategy.replace(retention=strategy.retention.with_budget(600))).slot
    layer = RaggedLayer(dataclasses.replace(slot, strategy=strategy, budgets=(200, 1000)))
    attended(layer, *(normal(1, 2, 1100, 32, seed=s) for s in (0, 1)))
    token = normal(1, 2, 1, 32, seed=2)

    def step():
        length, offset = layer.get_mask_sizes(1)
        visible = torch.arange(offset, offset + length) <= layer.get_seq_length()
        sdpa(token, *layer.update(token, token), attn_mask=visible.view(1, 1, 1, length))

    peaks = sorted(peak_bytes(step) for _ in range(7))
    assert layer.kept() == [207, 1007]
    assert peaks[3] < 1207 * 32 * 4 * 2 / 2, f"{peaks} bytes, of half of what is held"
