"""A store beside `generate`: warm equals cold, bit for bit, and what it cannot serve is right."""

import copy
import os
import threading
import warnings

import pytest
import torch
from asked import answer, equal, rows

import kvplug
from kvplug.compat import cache_argument, output_cache
from kvplug.store import record
from kvplug.testing.architectures import ARCHITECTURES, make
from kvplug.testing.pairs import pairwise
from kvplug.testing.tools import left_padded, prompt, same, tiny_llama

CODECS = ["exact(block=8)", "int8(block=8)", "int4(block=8, tail=8)", "int(block=8, tail=3)"]
PLACES = ["device", "host", "disk"]
BATCHES = {
    "one row": ([45], {}),
    "left-padded batch of 4": ([45, 52, 44, 47], {}),
    "beams": ([45], {"num_beams": 3}),
    "beams of a padded batch": ([45, 52], {"num_beams": 2}),
    "sequences returned": ([45], {"num_beams": 4, "num_return_sequences": 2}),
}
PAIRS = pairwise(
    {"batch": [*BATCHES], "codec": CODECS, "place": PLACES, "kind": ["memory", "file"]}
)


def a_url(kind, folder):
    """A store that no other test shares."""
    return kvplug.Store("memory://") if kind == "memory" else folder.as_uri()


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: ", ".join(row.values()))
def test_warm_is_cold(model, row, tmp_path):
    """A loaded prefix, a computed one, and one that was half there: the same bits."""
    batch, codec, place, kind = row.values()
    lengths, kwargs = BATCHES[batch]
    inputs, spec = rows(*lengths), f"{codec}+{place}"
    store = kvplug.store.open(a_url(kind, tmp_path))
    half = {name: x[:, :30] if len(lengths) == 1 else x for name, x in inputs.items()}
    cold = answer(model, inputs, spec, {"store": store}, **kwargs)
    assert (store.stats()["reused_tokens"], store.stats()["saved"] > 0) == (0, True)
    warm = answer(model, inputs, spec, {"store": store}, **kwargs)
    assert store.stats()["reused_tokens"] >= 32 * len(lengths)
    assert equal(warm, cold)
    other = kvplug.Store("memory://")
    answer(model, half, spec, {"store": other}, **kwargs)
    assert equal(answer(model, inputs, spec, {"store": other}, **kwargs), cold)
    if codec.startswith("exact"):
        assert torch.equal(cold[0], answer(model, inputs, **kwargs)[0])
    assert not store.stats()["fallbacks"]


def test_who_was_first_makes_no_difference(model):
    """Placements share what they store; a row of a batch finds what another call has left."""
    store = kvplug.Store("memory://")
    inputs = rows(45)
    cold = answer(model, inputs, "int4(block=8, tail=8)", {"store": store})
    for spec in ("int4(block=8, tail=8)+host", "int4(block=8, tail=8)+disk+reference"):
        before = store.stats()["reused_tokens"]
        assert torch.equal(answer(model, inputs, spec, {"store": store})[0], cold[0])
        assert store.stats()["reused_tokens"] == before + 4 + 32  # the first tokens, two chunks
    batch = rows(45, 52)
    alone = answer(model, batch, "int4(block=8, tail=8)", {"store": kvplug.Store("memory://")})
    before = store.stats()["hits"]
    assert equal(answer(model, batch, "int4(block=8, tail=8)", {"store": store}), alone)
    assert store.stats()["hits"] == before + 2  # of the row that was known


def test_keys_of_a_chunk_are_rounded_for_its_queries(model):
    """All of them at once, the newest too: none waits for the next chunk's, or for none."""
    told = {"store": kvplug.Store("memory://"), "chunk": 16}
    cache = kvplug.build("int4(block=8, tail=8)", model.config, cache_config=told)
    model.generate(prompt(45), **cache_argument(cache), max_new_tokens=1)
    stats = cache.stats()
    assert stats["blocks_for_queries"] == stats["blocks_encoded"] == len(cache.layers) * 4


def test_a_chunk_that_fails_leaves_a_cache_that_encodes_as_ever(model):
    """A cache of the caller's own outlives the call: its tail is as long as the codec says."""
    told = {"store": kvplug.Store("memory://"), "chunk": 16}
    cache = kvplug.build("int4(block=8, tail=8)", model.config, cache_config=told)

    def fail(*_):
        assert any(layer.sealing for layer in cache.layers)
        raise KeyboardInterrupt

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(45), **cache_argument(cache), max_new_tokens=1)
    handle.remove()
    assert not any(layer.sealing for layer in cache.layers)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_thread_writes_where_a_core_is_free(model, monkeypatch, cores):
    """Of the cores this process may run on, not of all there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    store, writers = kvplug.Store("memory://"), set()
    save = store.save

    def noted(*args, **kwargs):
        writers.add(threading.current_thread())
        save(*args, **kwargs)

    monkeypatch.setattr(store, "save", noted)
    answer(model, rows(45), "int8(block=8, tail=8)", {"store": store})
    assert writers
    assert (threading.current_thread() in writers) == (cores == 1)


def test_a_later_turn_of_a_chat(model):
    """A prompt that goes on finds the chunks of the one before; the last token is computed."""
    store = kvplug.Store("memory://")
    for n, reused in ((16, 0), (17, 0), (33, 16), (33, 32), (90, 32), (81, 80)):
        before, inputs = store.stats()["reused_tokens"], {"input_ids": prompt(90)[:, :n]}
        tokens, _ = answer(model, inputs, "exact(block=8)", {"store": store})
        assert store.stats()["reused_tokens"] == before + reused
        assert torch.equal(tokens, answer(model, inputs)[0])


def test_the_cache_goes_on_and_says_what_it_reused(model):
    """What `generate` returns is as any cache; so is one that the caller has built."""
    store, told = kvplug.Store("memory://"), {"cache_implementation": "int8(block=8)"}
    config = {"store": store, "chunk": 16}
    new = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    ends = []
    for _ in range(2):
        out = model.generate(prompt(45), cache_config=config, **told, **new)
        ids = torch.cat((out.sequences, prompt(9, seed=4)), 1)
        cache = output_cache(out)
        reused = cache.stats()["reused_tokens"]
        twin = copy.deepcopy(cache)
        ends += [model.generate(ids, **cache_argument(c), **new).sequences for c in (cache, twin)]
    assert reused == 4 + 32
    assert all(torch.equal(x, ends[0]) for x in ends)
    built = kvplug.build("int8(block=8)", model.config, cache_config=config)
    again = model.generate(prompt(45), **cache_argument(built), **new).sequences
    assert torch.equal(again, out.sequences)
    assert built.stats()["reused_tokens"] == 4 + 32


@pytest.mark.parametrize(
    ("spec", "reused"),
    [("exact(block=8)", 48), ("int8(block=8)", 4 + 48), ("int4(block=8, tail=8)+host", 4 + 32)],
)
@pytest.mark.parametrize("window", [6, 21])
def test_sliding_layers(spec, reused, window):
    """Windows shorter than a chunk are stored whole at its end, others as they come."""
    model = make("gemma3, sliding")
    config = copy.deepcopy(model.config)
    config.get_text_config().sliding_window = window
    model = type(model)(config).eval()
    store, inputs = kvplug.Store("memory://"), {"input_ids": prompt(58)}
    options = {"pad_token_id": 0}
    cold = answer(model, inputs, spec, {"store": store}, **options)
    warm = answer(model, inputs, spec, {"store": store}, **options)
    assert store.stats()["reused_tokens"] == reused
    assert equal(warm, cold)
    if spec.startswith("exact"):
        assert torch.equal(cold[0], answer(model, inputs, **options)[0])
    padded = left_padded([prompt(58)[0], prompt(40)[0]])
    answer(model, padded, spec, {"store": store}, **options)
    assert store.stats()["fallbacks"] == {"padding beside sliding windows": 1}


@pytest.mark.parametrize(
    ("name", "lengths"), [("llava", [45, 52]), ("qwen2_vl", [45, 52]), ("gemma3, pictures", [45])]
)
def test_models_of_text_and_pictures(name, lengths):
    """A prompt without a picture is as any other; one with a picture goes the plain way."""
    model, store = make(name), kvplug.Store("memory://")
    inputs, spec, options = rows(*lengths), "exact(block=8)", {"pad_token_id": 0}
    cold, warm = (answer(model, inputs, spec, {"store": store}, **options) for _ in range(2))
    assert store.stats()["reused_tokens"] == 32 * len(lengths)
    assert equal(warm, cold)
    assert torch.equal(cold[0], answer(model, inputs, **options)[0])
    assert not store.stats()["fallbacks"]
    saved, seen = store.stats()["saved"], ARCHITECTURES[name].media(prompt(45))
    told = answer(model, seen, spec, {"store": store}, **options)
    assert equal(told, answer(model, seen, spec, **options))
    assert (store.stats()["saved"], *store.stats()["fallbacks"].values()) == (saved, 1)


def test_calls_that_a_store_does_not_serve(model):
    """Each goes the plain way, with the answer of a call that names no store, and is counted."""
    inputs, spec = rows(45), "int8(block=8)"
    padded = rows(45, 38)
    holes = {name: x.clone() for name, x in padded.items()}
    holes["attention_mask"][0, 9] = 0
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    shifted = inputs | {"position_ids": torch.arange(3, 48)[None]}
    new = {"max_new_tokens": 4, "do_sample": False}
    for given, kwargs, reason in (
        (inputs, {"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        (inputs, {"assistant_model": tiny_llama(num_hidden_layers=1)}, "assisted decoding"),
        (inputs, {"prefill_chunk_size": 9}, "prefill_chunk_size"),
        (inputs, {"output_attentions": True}, "attentions returned"),
        (inputs, {"output_hidden_states": True}, "hidden states returned"),
        (padded, {"return_dict_in_generate": True}, "padding, and a cache that outlives the call"),
        (holes, {}, "a mask with holes"),
        (embeds, {}, "argument inputs_embeds"),
        (shifted, {}, "own position ids"),
    ):
        store = kvplug.Store("memory://")
        call = {**given, **new, **kwargs, "cache_implementation": spec}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, of what is asked for here
            plain = model.generate(**call)
            told = model.generate(**call, cache_config={"store": store, "chunk": 16})
        plain, told = (getattr(x, "sequences", x) for x in (plain, told))
        assert torch.equal(plain, told), reason
        assert store.stats()["fallbacks"].get(reason) == 1, (reason, store.stats())
        assert not store.stats()["saved"]
    model.train()
    store = kvplug.Store("memory://")
    model.generate(**inputs, **new, cache_implementation="growing", cache_config={"store": store})
    assert store.stats()["fallbacks"] == {"training": 1}


@pytest.mark.parametrize(
    ("spec", "config", "error"),
    [
        ("window(length=9)", {"store": "memory://"}, "'window' drops .* use retention 'full'"),
        ("sinks", {"store": "memory://"}, "'sinks' drops"),
        ("kvplug:static", {"store": "memory://"}, "'static' has room .* use layout 'growing'"),
        ("int4", {"salt": "x"}, "'salt' and no 'store'"),
        ("int4", {"store": "memory://", "chunk": 0}, "chunk=0: a number of tokens"),
        ("int4", {"store": "memory://", "verify": "ful"}, "Did you mean 'full'"),
        ("int4", {"store": "memory://", "tial": 3}, "Did you mean 'tail'"),
        ("int4", {"store": "nosuch://"}, "nosuch"),
        ("int4", {"store": 5}, "5 is no store"),
    ],
)
def test_what_cannot_have_a_store_says_so_before_the_model_runs(model, spec, config, error):
    with pytest.raises(kvplug.KvplugError, match=error):
        model.generate(prompt(9), cache_implementation=spec, cache_config=config, max_new_tokens=2)
    if not spec.startswith("kvplug"):
        with pytest.raises(kvplug.KvplugError, match=error):
            kvplug.build(spec, model.config, cache_config=config)


def test_tenants_and_models_never_meet(model):
    """No hit across salts or weights; and the caller's cache_config stays as it is."""
    store, inputs, spec = kvplug.Store("memory://"), rows(45), "int8(block=8)"
    config = {"store": store, "salt": "tenant-1", "chunk": 16}
    kept = dict(config)
    cold = answer(model, inputs, spec, config)
    assert config == kept
    for salt in ("tenant-2", "", "tenant-1 "):
        assert equal(answer(model, inputs, spec, {"store": store, "salt": salt}), cold)
        assert store.stats()["hits"] == 0
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.25)
    answer(other, inputs, spec, config)
    assert store.stats()["hits"] == 0
    with torch.no_grad():  # the same object, other weights
        model.model.layers[1].mlp.up_proj.weight.mul_(1.25)
    changed = answer(model, inputs, spec, config)
    assert store.stats()["hits"] == 2  # what `other` has left
    assert equal(changed, answer(other, inputs, spec, {"store": kvplug.Store("memory://")}))


def test_another_first_token_finds_nothing(model):
    """Where first tokens stay exact beside the blocks, the first chunk is named by them as well."""
    store, spec = kvplug.Store("memory://"), "int8(block=8)"
    one = prompt(45)
    other = one.clone()
    other[0, 0] += 1
    answer(model, {"input_ids": one}, spec, {"store": store})
    found = answer(model, {"input_ids": other}, spec, {"store": store})
    assert store.stats()["hits"] == 0
    alone = answer(model, {"input_ids": other}, spec, {"store": kvplug.Store("memory://")})
    assert equal(found, alone)


def mutated(data, n):
    """A record that is not what was written: bits, length, or all of it another."""
    data = bytearray(data)
    if n % 4 == 0:
        return bytes(data[: (n * 7919) % len(data)])
    if n % 4 == 1:
        data[: 1 + n % 90] = bytes(1 + n % 90)
    where = (n * 104_729 + n**3) % len(data) if n % 4 == 2 else n % 400
    data[where] ^= 1 << (n % 8)
    return bytes(data)


def strangers(inputs, spec, told):
    """Whole records of the same chunks: of other models, tenants, codecs, lengths, versions."""
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.25)
    found = []
    for other, its_spec, option in (
        (model, spec, {}),
        (tiny_llama(num_hidden_layers=1, rope_theta=7.0), spec, {}),
        (tiny_llama(num_hidden_layers=1), spec, {"salt": "tenant-2"}),
        (tiny_llama(num_hidden_layers=1), "int4(block=8)", {}),
        (tiny_llama(num_hidden_layers=1), spec, {"chunk": 8}),
    ):
        store = kvplug.Store("memory://")
        answer(other, inputs, its_spec, told | {"store": store} | option)
        found += whole_records(store).values()
    magic = len(record.MAGIC)
    newer = [record.MAGIC[:-1] + b"\x02" + x[magic:] for x in found[:2]]
    return found + newer


def whole_records(store):
    return {e.key: bytes(next(iter(store._backend.get_many([e.key])))) for e in store.entries()}


def test_a_thousand_bad_records(tmp_path):
    """Bits, truncation, whole records of others: never a wrong answer, never an error."""
    model, inputs, spec = tiny_llama(num_hidden_layers=1), rows(37), "int8(block=8)"
    store = kvplug.Store(tmp_path.as_uri())
    told = {"store": store, "chunk": 16}
    new = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    new |= {"return_dict_in_generate": True}

    def ask():
        out = model.generate(**inputs, **new, cache_implementation=spec, cache_config=told)
        return out.logits[0]

    cold = ask()
    whole = whole_records(store)
    others, keys, wrong, misses = strangers(inputs, spec, told), list(whole), 0, 0
    for n in range(1000):
        key = keys[n % 2]
        if n % 5 < 4:
            bad = mutated(whole[key], n)
        else:
            bad = (whole[keys[1 - n % 2]], *others)[n // 5 % (1 + len(others))]
        store.delete([key])
        store._backend.put_many([(key, bad)], [])
        before = store.stats()["hits"]
        wrong += not same(ask(), cold)
        misses += store.stats()["hits"] - before < 2
    assert (wrong, misses) == (0, 1000)
    assert same(ask(), cold)
    assert {"truncated", "version", "key", "checksum"} <= set(store.stats()["misses"])


class Broken:
    """A back end of which nothing works."""

    evicted = 0

    def __getattr__(self, name):
        raise ConnectionError("gone")


def test_a_store_that_fails_changes_no_answer(model):
    inputs, spec = rows(45), "int4(block=8, tail=8)"
    cold = answer(model, inputs, spec, {"store": kvplug.Store("memory://")})
    store = kvplug.Store("memory://")
    store._backend = Broken()
    assert equal(answer(model, inputs, spec, {"store": store}), cold)
    assert store.stats()["reused_tokens"] == 0


def test_chunks_that_do_not_fit_are_computed(model, monkeypatch):
    """What proves itself and is still of no use, as from a format that has changed."""
    inputs, spec, store = rows(45), "int8(block=8)", kvplug.Store("memory://")
    cold = answer(model, inputs, spec, {"store": store})
    load = kvplug.Store.load

    def other(self, keys):
        for tensors in load(self, keys):
            yield {name: x[:1] for name, x in tensors.items()}

    monkeypatch.setattr(kvplug.Store, "load", other)
    assert equal(answer(model, inputs, spec, {"store": store}), cold)
    assert store.stats()["reused_tokens"] == 0
