"""Widths by layer: measured, assigned, kept in a file, and taken by name."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import kvplug
from kvplug import calibration
from kvplug.cli import main
from kvplug.codecs import sensitivity, widths
from kvplug.codecs.rotated import Rotated
from kvplug.compat import cache_argument, output_cache
from kvplug.spec import parse
from kvplug.store.keys import root
from kvplug.testing.architectures import Absent, make
from kvplug.testing.tools import DRAWN, GREEDY, normal, prompt, tiny_llama

LAYERS = 4
TEXT = " ".join(f"w{i * i % 89 + 2}" for i in range(1100))


@pytest.fixture(scope="module")
def model():
    # weights drawn less wide than of other tests: what is stored then matters a little everywhere
    return tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.15)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w1"))
    backend.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w1")


@pytest.fixture(scope="module")
def path(model, tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("calibration") / "tiny.safetensors")
    kvplug.calibrate(model, tokenizer, path, TEXT)
    return path


def codecs_of(spec, config):
    strategy = parse(spec).resolve(config)
    return [strategy.at(i, LAYERS).codec for i in range(LAYERS)]


def bits_of(codecs):
    return sum(codec.k_bits + codec.v_bits for codec in codecs)


# --------------------------------------------------------------------------------- what is measured


@torch.no_grad()
def kl_of_storing(model, window, codec):
    """KL, summed over the second half of a window, with one side of a layer stored: [L, 2]."""
    half = len(window) // 2
    whole = (half - codec.first - codec.tail) // codec.block * codec.block
    filled = transformers.DynamicCache(config=model.config)
    model(window[None, :half], **cache_argument(filled))

    def says(cache):
        logits = model(window[None, half:], **cache_argument(cache)).logits[0]
        return logits.double().log_softmax(-1)

    exact = says(copy.deepcopy(filled))
    found = torch.zeros(LAYERS, 2)
    for layer, side in itertools.product(range(LAYERS), (0, 1)):
        cache = copy.deepcopy(filled)
        x = cache.layers[layer].keys if side == 0 else cache.layers[layer].values
        stored = x[:, :, codec.first : codec.first + whole]
        data = codec.encode_side(stored.unflatten(2, (-1, codec.block)), side)
        stored.copy_(codec.decode_side(data, side).flatten(2, 3))
        found[layer, side] = (exact.exp() * (exact - says(cache))).sum()
    return found


@pytest.mark.parametrize("bits", [4, 6])
def test_costs_are_the_kl_of_storing_one_side_of_one_layer(model, bits):
    """Of errors that are small; one answer drawn per token leaves some noise."""
    windows = prompt(512, 16)
    told = sensitivity.measure(model, windows)["widths.kl"]
    assert told.shape == (LAYERS, 2, len(widths.BITS))
    told = told[..., widths.BITS.index(bits)]
    codec = Rotated(k_bits=bits, v_bits=bits)
    true = torch.stack([kl_of_storing(model, x, codec) for x in windows]).mean(0) / 256
    torch.testing.assert_close(told, true, rtol=0.5, atol=0)
    assert told.sum() == pytest.approx(float(true.sum()), rel=0.25)


class Shorter(Rotated):
    """Stores nine tenths of everything."""

    def encode_side(self, x, side):
        return {"x": x}

    def decode_side(self, data, side):
        return 0.9 * data["x"]


def test_what_all_tokens_lose_alike_adds_up():
    x, g = (normal(1, 2, 100, 8, seed=seed) for seed in (1, 2))
    told = sensitivity._costs(x, g, 1, [Shorter(first=4, tail=32)])
    one = (0.1 * g * x)[:, :, 4:68].sum((2, 3))  # of each head
    assert told.item() == pytest.approx(float(one.square().sum() / 2), rel=1e-4)


def test_measuring_leaves_the_model_as_it_is(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    sensitivity.measure(model, prompt(512, 1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None and x.requires_grad for x in model.parameters())


def test_windows_that_store_no_block_are_refused(model):
    with pytest.raises(kvplug.SpecError, match=r"windows of 256 tokens store no block of int\(k"):
        sensitivity.measure(model, prompt(256, 1))


# ------------------------------------------------------------------------------- what is made of it


def test_bits_go_where_they_save_most():
    falling = torch.tensor([4.0**-bits for bits in widths.BITS])
    weight = torch.tensor([[64.0, 1], [2, 1], [1, 16]])
    numbers = torch.full((3, 2), 128)
    assert widths.assign(weight[..., None] * falling, numbers, (3, 3)) == [(5, 2), (3, 2), (2, 4)]
    # nothing to save: nothing is spent
    assert widths.assign(torch.zeros(3, 2, 6), numbers, (4, 4)) == [(2, 2)] * 3


def test_a_layer_that_stores_nothing_has_no_bits():
    kl = torch.ones(2, 2, len(widths.BITS)) * torch.tensor([4.0**-bits for bits in widths.BITS])
    kl[0] = torch.nan
    assert widths.assign(kl, torch.tensor([[0, 0], [8, 8]]), (3, 3)) == [None, (3, 3)]


@DRAWN
@given(st.data())
def test_never_more_bits_than_asked(data):
    layers = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 99))
    wanted = data.draw(st.tuples(*[st.sampled_from(widths.BITS)] * 2))
    draw = torch.Generator().manual_seed(seed)
    numbers = 8 * torch.randint(1, 4, (layers, 2), generator=draw)
    weight = torch.rand(layers, 2, 1, generator=draw) ** 4
    kl = weight * torch.tensor([4.0**-bits for bits in widths.BITS])
    found = torch.tensor(widths.assign(kl, numbers, wanted))
    spent, room = (found * numbers).sum(), (torch.tensor(wanted) * numbers).sum()
    assert spent <= room
    left = room - spent  # too little for any further step
    for i in range(layers):
        for side in range(2):
            at = widths.BITS.index(found[i, side])
            if at + 1 < len(widths.BITS):
                assert (widths.BITS[at + 1] - found[i, side]) * numbers[i, side] > left


# ---------------------------------------------------------------------------------- how it is named


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int(k_bits=5, v_bits=2, tail=8)"])
def test_a_preset_takes_widths_of_its_own_in_each_layer(model, path, name):
    plain = parse(name).codec
    named = (
        f"{name[:-1]}, calibration={path!r})" if "(" in name else f"{name}(calibration={path!r})"
    )
    for spec, arguments in ((name, {"calibration": path}), (named, None)):
        strategy = parse(spec, arguments).resolve(model.config)
        assert path not in repr(strategy)
        assert repr(parse(repr(strategy))) == repr(strategy) == repr(strategy.resolve(model.config))
        codecs = [strategy.at(i, LAYERS).codec for i in range(LAYERS)]
        assert len(set(codecs)) > 1
        assert bits_of(codecs) <= LAYERS * (plain.k_bits + plain.v_bits)
        assert {(x.block, x.tail, x.first, x.group) for x in codecs} == {
            (plain.block, plain.tail, plain.first, plain.group)
        }


def test_widths_are_those_that_were_measured_to_cost_least(model, path):
    kl = calibration.read(path, model.config, widths.SECTION)["kl"]

    def cost(codecs):
        at = [(widths.BITS.index(x.k_bits), widths.BITS.index(x.v_bits)) for x in codecs]
        return sum(float(kl[i, 0, k] + kl[i, 1, v]) for i, (k, v) in enumerate(at))

    plain = [parse("int3").codec] * LAYERS
    assert cost(codecs_of(f"int3(calibration={path!r})", model.config)) < 0.9 * cost(plain)


def test_keys_count_half_as_they_are_rounded_for_queries(model, path, tmp_path):
    falling = torch.tensor([4.0**-bits for bits in widths.BITS])
    file = str(tmp_path / "made.safetensors")
    for keys, wanted in ((1.5, (2, 3)), (2.5, (3, 2))):
        made = load_file(path) | {"widths.kl": torch.tensor([[[keys], [1.0]]] * LAYERS) * falling}
        calibration.write(file, made, model.config, {})
        for codec in codecs_of(f"int2(calibration={file!r})", model.config):
            assert (codec.k_bits, codec.v_bits) == wanted


def test_single_layers_share_the_bits_of_their_own(model, path):
    int3 = f"int3(calibration={path!r})"
    codecs = codecs_of(f"int8+{int3}@(1, -1)", model.config)
    assert codecs[0] == codecs[2] == parse("int8").codec
    assert bits_of([codecs[1], codecs[3]]) <= 12
    codecs = codecs_of(f"{int3}+int8@0", model.config)
    assert codecs[0] == parse("int8").codec
    assert bits_of(codecs[1:]) <= 18


def test_a_cache_needs_the_file_no_more(model, tokenizer, tmp_path):
    path = tmp_path / "tiny.safetensors"
    kvplug.calibrate(model, tokenizer, path, TEXT)
    arguments = {"calibration": str(path), "block": 8, "tail": 8}
    cache = {"cache_implementation": "int3", "cache_config": arguments}
    ids = prompt(40)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = model.generate(**inputs, **cache, **GREEDY, return_dict_in_generate=True)
    held = output_cache(out)
    size = kvplug.estimate(parse("int3", arguments), model.config, context=40)
    held.save(tmp_path / "saved")
    path.unlink()
    again = kvplug.load(tmp_path / "saved", model)
    assert repr(again.strategy) == repr(held.strategy)
    assert size == kvplug.estimate(held.strategy, model.config, context=40)


def test_keys_of_a_store_are_those_of_the_widths(model, path, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(path).read_bytes())

    def of(spec):
        return root(model, parse(spec).resolve(model.config), 64, "", model_id="tiny")

    mine = of(f"int3(calibration={path!r})")
    assert mine == of(f"int3(calibration={str(copy)!r})") != of("int3")


@pytest.mark.parametrize("name", ["gemma3, sliding", "falcon_h1, mamba in each layer"])
def test_layers_of_other_kinds(name, tokenizer, tmp_path):
    """Windows shorter than a block, states beside attention: what stores no block has no cost."""
    try:
        model = make(name)
    except Absent as e:
        pytest.skip(str(e))
    model.config.max_position_embeddings = 512  # windows that store a block
    path = str(tmp_path / "a.safetensors")
    kvplug.calibrate(model, tokenizer, path, TEXT)
    cache = kvplug.build(f"int3(calibration={path!r}, block=8, tail=8)", model.config)
    inputs = {"input_ids": prompt(40), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    out = model.generate(**inputs, **cache_argument(cache), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44)


def test_where_nothing_can_be_measured_it_says_why(model, tokenizer, tmp_path):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    file = tmp_path / "a.safetensors"
    about = kvplug.calibrate(eager, tokenizer, file, TEXT)
    assert list(about["unmeasured"]) == ["budgets"]
    eager.config.max_position_embeddings = 256
    with pytest.raises(kvplug.SpecError, match=r"store no block of .*too short to measure heads"):
        kvplug.calibrate(eager, tokenizer, tmp_path / "b", TEXT)
    assert list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------------------------- what is no file


def test_a_file_of_another_model_names_both(model, path, tmp_path):
    other = tiny_llama(hidden_size=32, num_hidden_layers=LAYERS)
    other.config.name_or_path = "somebody/other"
    with pytest.raises(kvplug.SpecError) as e:
        kvplug.build(f"int3(calibration={path!r})", other.config)
    assert (
        f"calibration={path!r} is of '', whose hidden_size is 64, and the hidden_size of "
        in str(e.value)
    )
    assert "'somebody/other' is 32; `kvplug calibrate --model MODEL --out FILE`" in str(e.value)


def test_what_is_no_calibration_is_refused_before_the_model_runs(model, path, tmp_path):
    lost, text, other = (str(tmp_path / name) for name in ("lost", "text", "other"))
    Path(text).write_text("no tensors", encoding="utf-8")
    save_file({"a": torch.zeros(1)}, other)
    for file, said in (
        (lost, "No such file"),
        (text, "is not what kvplug calibrate"),
        (other, "is not what kvplug calibrate"),
    ):
        with pytest.raises(kvplug.SpecError, match=said):
            kvplug.build("int3", model.config, cache_config={"calibration": file})
    empty, newer = str(tmp_path / "empty"), str(tmp_path / "newer")
    calibration.write(empty, {"budgets.share": torch.zeros(1)}, model.config, {})
    calibration.write(newer, load_file(path), model.config, {"format": 2})
    for file, said in (
        (empty, "has nothing on widths"),
        (newer, "has format 2, this kvplug reads 1"),
    ):
        arguments = {"cache_implementation": "int3", "cache_config": {"calibration": file}}
        with pytest.raises(kvplug.SpecError, match=said):
            model.generate(prompt(8), **arguments, **GREEDY)


def test_the_option_is_refused_by_what_has_none():
    with pytest.raises(kvplug.SpecError, match="unknown argument of 'fp8'"):
        parse("fp8", {"calibration": "a"})


def test_a_file_is_replaced_whole_or_not_at_all(model, path, tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"before")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        calibration.write(file, load_file(path), model.config, {})
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_the_command(model, tokenizer, tmp_path, capsys):
    folder, text, out = tmp_path / "model", tmp_path / "a.txt", tmp_path / "a.safetensors"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text(TEXT, encoding="utf-8")
    command = ["calibrate", "--model", str(folder), "--out", str(out)]
    assert main([*command, "--text", str(text)]) == 0
    said = capsys.readouterr().out
    assert f"use it as int3(calibration={str(out)!r})" in said
    why = "windows of 512 tokens are too short to measure heads on"
    assert f"nothing on budgets: {why}" in said
    with pytest.raises(kvplug.SpecError, match=f"has nothing on budgets: {why}"):
        kvplug.build(f"expected(heads={str(out)!r})", model.config)
    with calibration.safe_open(out, "pt") as file:
        about = json.loads(file.metadata()[calibration.ENTRY])
    assert about["tokens"] == 1024
    assert about["model"]["num_hidden_layers"] == LAYERS
    assert about["text"].startswith("text sha256:")
    assert about["name"] == str(folder)
    text.write_text("w3 w4", encoding="utf-8")
    assert main([*command, "--text", str(text)]) == 2
    assert "a text of 2 tokens: calibration takes 2 windows of 512" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "no" / "a")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
