"""`cache.save(folder)` and `kvplug.load(folder, model)`, in this process and in a new one."""

import json
import shutil
import signal

import pytest
import torch
from forked import forked
from fresh import fresh
from transformers import T5Config, T5ForConditionalGeneration

import kvplug
from kvplug import saved
from kvplug.compat import cache_argument, layer_devices, output_cache
from kvplug.testing.architectures import Absent, make
from kvplug.testing.specs import BUILTIN, SMALL, strategies
from kvplug.testing.tools import GREEDY, left_padded, prompt, same, tiny_llama

EVERY = [
    *strategies(),
    *SMALL.values(),
    *(f"{name}(block=8)" for name in BUILTIN["codec"]),
    "int4(block=8, tail=8)+int8(block=8)@-1",
    "static+int4(block=8, tail=8)+int8(block=8)@0",
]
EVERY = list(dict.fromkeys(EVERY))
CHILD = """
import json, sys, torch, kvplug
from kvplug.compat import cache_argument
from kvplug.testing.tools import GREEDY, tiny_llama
torch.set_num_threads(1)
model, said = tiny_llama(), []
for i, tokens in enumerate(json.load(open("asked.json"))):
    cache = kvplug.load(str(i), model)
    ids = torch.tensor(tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = model.generate(**inputs, **cache_argument(cache), **GREEDY)
    said.append(out.tolist())
json.dump(said, open("said.json", "w"))
"""


def go_on(model, ids, cache):
    """`generate`, told that all ids are tokens: some of those that were made may be 0."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**inputs, **cache_argument(cache), **GREEDY)


def test_every_strategy_goes_on_in_a_new_process(model, tmp_path):
    """Codecs, placements, layouts and retention, of which no list is kept here."""
    for kind in ("codec", "placement", "layout", "retention"):
        assert set(BUILTIN[kind]) <= {getattr(kvplug.parse(spec), kind).name for spec in EVERY}
    asked, expected = [], []
    for i, spec in enumerate(EVERY):
        cache = kvplug.build(spec, model.config, max_cache_len=80)
        start = model.generate(prompt(31, 2), **cache_argument(cache), **GREEDY)
        cache.save(tmp_path / str(i))
        asked.append(torch.cat((start, prompt(3, 2, seed=4)), 1))
        expected.append(go_on(model, asked[-1], cache).tolist())
    (tmp_path / "asked.json").write_text(json.dumps([x.tolist() for x in asked]))
    fresh(CHILD, cwd=tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said) == len(EVERY) > 20
    wrong = [spec for spec, a, b in zip(EVERY, said, expected, strict=True) if a != b]
    assert not wrong


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("gemma3, sliding", "int4(block=8, tail=8)"),
        ("gemma3, sliding", "static+int4(block=8)"),
        ("falcon_h1, mamba in each layer", "int8(block=8)"),
        ("qwen3_next, linear hybrid", "int8(block=8)+disk"),
    ],
)
def test_layers_that_are_not_ours(name, spec, tmp_path):
    try:
        model = make(name)
    except Absent as e:
        pytest.skip(str(e))
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cache = kvplug.build(spec, model.config, max_cache_len=64)
    start = model.generate(prompt(21, 2), **cache_argument(cache), **new)
    cache.save(tmp_path)
    back = kvplug.load(tmp_path, model)
    written = {k: x for k, x in cache.state_dict().items() if isinstance(x, torch.Tensor)}
    read = back.state_dict()
    assert all(same(read[k], x) for k, x in written.items())
    longer = torch.cat((start, prompt(3, 2, seed=4)), 1)
    assert torch.equal(*(go_on(model, longer, x) for x in (cache, back)))


def test_what_generate_returned_and_a_padded_batch(model, tmp_path):
    """Room that `generate` chose may grow after loading; padding is where it was."""
    batch = left_padded([prompt(20)[0], prompt(13)[0]])
    for spec in ("kvplug:static", "sinks(sinks=2, window=10)"):
        out = model.generate(
            **batch, cache_implementation=spec, return_dict_in_generate=True, **GREEDY
        )
        cache = output_cache(out)
        cache.save(tmp_path)
        new = torch.ones(2, 15, dtype=torch.long)
        longer = {
            "input_ids": torch.cat((out.sequences, prompt(1, 2, seed=4)), 1),
            "attention_mask": torch.cat((batch["attention_mask"], new), 1),
        }
        back = kvplug.load(tmp_path, model)
        assert back.may_grow == cache.may_grow
        a, b = (model.generate(**longer, **cache_argument(x), **GREEDY) for x in (cache, back))
        assert torch.equal(a, b)


def test_an_empty_cache(model, tmp_path):
    kvplug.build("int4+host", model.config).save(tmp_path)
    back = kvplug.load(tmp_path, model)
    assert (repr(back.strategy), back.get_seq_length()) == (repr(kvplug.parse("int4+host")), 0)


def test_a_writer_that_is_killed_leaves_a_whole_cache(model, tmp_path):
    """And no more than one cache's files, once another has written."""
    cache = kvplug.build("int8(block=8)", model.config)
    cache.save(tmp_path)

    def overwrite(after):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as it stands
        while True:
            with torch.no_grad():
                model(prompt(1), **cache_argument(cache))
            cache.save(tmp_path)
            if not signal.getitimer(signal.ITIMER_REAL)[0]:  # once it has written, however slowly
                signal.setitimer(signal.ITIMER_REAL, after)

    seen = []
    for i in range(12):
        code, _ = forked(lambda i=i: overwrite(0.02 + 0.0017 * i))
        assert code == -signal.SIGALRM
        seen.append(kvplug.load(tmp_path, model).get_seq_length())
    assert min(seen) > 0
    cache.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cache in .*nothing.* writes one"):
        kvplug.load(tmp_path / "nothing", model)
    cache = kvplug.build("int8(block=8)", model.config)
    with torch.no_grad():
        model(prompt(20), **cache_argument(cache))
    cache.save(tmp_path)
    with pytest.raises(kvplug.Mismatch, match=r"hidden_size is 64, and that of LlamaFor.* is 32"):
        kvplug.load(tmp_path, tiny_llama(hidden_size=32))
    file = next(tmp_path.glob("*/001.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(kvplug.Mismatch, match=r"001\.safetensors is not as it was written"):
        kvplug.load(tmp_path, model)
    file.unlink()
    with pytest.raises(kvplug.Mismatch, match=r"001\.safetensors is not as it was written"):
        kvplug.load(tmp_path, model)
    index = tmp_path / "cache.json"
    head = json.loads(index.read_text())
    index.write_text(json.dumps(head | {"format": 99}))
    with pytest.raises(kvplug.Mismatch, match=r"format 1 .* format 99"):
        kvplug.load(tmp_path, model)
    for text in ("[1", "{}", "[]"):
        index.write_text(text)
        with pytest.raises(kvplug.Mismatch, match=r"cache\.json is not what cache\.save"):
            kvplug.load(tmp_path, model)


class Stateless(kvplug.Layer):
    state = kvplug.AttentionLayer.state


def test_caches_without_a_state_say_so_and_leave_what_was_there(model, tmp_path):
    kvplug.build("growing", model.config).save(tmp_path)
    cache = kvplug.build("int8", model.config)
    cache.layers[1] = Stateless(cache.layers[1].slot)
    with pytest.raises(kvplug.SpecError, match="Stateless, the layer of int8, has no state"):
        cache.save(tmp_path)
    assert str(kvplug.load(tmp_path, model).strategy) == "growing"
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
                 decoder_start_token_id=0, eos_token_id=None)
    )  # fmt: skip
    out = t5.generate(
        prompt(9), cache_implementation="int8", return_dict_in_generate=True, max_new_tokens=3
    )
    with pytest.raises(kvplug.SpecError, match="int8: the cache of an encoder-decoder"):
        output_cache(out).save(tmp_path)


def test_layers_go_where_those_of_the_model_compute(model):
    assert layer_devices(model, 2) == [torch.device("cpu")] * 2
    model.model.layers[1].to("meta")
    assert layer_devices(model, 2) == [torch.device("cpu"), torch.device("meta")]


def test_a_full_disk_leaves_the_cache_before(model, tmp_path, monkeypatch):
    cache = kvplug.build("growing", model.config)
    cache.save(tmp_path)
    with torch.no_grad():
        model(prompt(9), **cache_argument(cache))

    def full(tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save", full)
    with pytest.raises(OSError, match="No space"):
        cache.save(tmp_path)
    assert kvplug.load(tmp_path, model).get_seq_length() == 0
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    cache.save(tmp_path)
    assert kvplug.load(tmp_path, model).get_seq_length() == 9
