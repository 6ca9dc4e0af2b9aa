"""What outlives a call: other threads, children, exceptions, what came before, and memory."""

import gc
import importlib.util
import json
import logging
import multiprocessing
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import forked
from transformers import GenerationConfig, GenerationMixin

import kvplug
import kvplug.kernels.numba as package
from kvplug.compat import cache_argument
from kvplug.kernels.numba import process
from kvplug.placement.device import OnDevice
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt

CODED = "int4(block=16, tail=16)"
PINNED = "sinks(sinks=2, window=30)+int8(block=8)"
PLAIN = {"max_new_tokens": 12, "do_sample": False}


@cache
def model():
    return tiny_llama()


def tokens(strategy, seed=0, batch=1):
    ids = prompt(90, batch=batch, seed=seed)
    return model().generate(ids, cache_implementation=strategy, **PLAIN).tolist()


@pytest.fixture
def two_threads():
    """Torch's own operations on two threads: in a forked child these would wait for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(2_000_000).exp()
    yield
    torch.set_num_threads(before)


# --- children


@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_goes_on(caplog):
    """With a cache of its own, one of the parent's, and torch's own operations."""
    expected = tokens(CODED), tokens("int8(block=8)+numba")
    assert process.compiled.cache_info().currsize, "the kernel has run"
    begun = kvplug.build("int8(block=8)", model().config)
    settings = PLAIN | {"return_dict_in_generate": True}
    first = model().generate(prompt(60), **cache_argument(begun), **settings).sequences
    held = threading.Event()

    def hold():
        with process.ONE_AT_A_TIME:
            held.set()
            done.wait()

    def child():
        torch.randn(2_000_000).exp()
        with caplog.at_level(logging.WARNING, logger="kvplug"):
            assert (tokens(CODED), tokens("int8(block=8)+numba")) == expected
        assert caplog.text.count("goes on with one thread") == 1
        return model().generate(first, **cache_argument(begun), **PLAIN).tolist()

    done = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:  # as if another thread were in the kernel
        answer = forked(child)
    finally:
        done.set()
        thread.join()
    assert answer == (0, str(model().generate(first, **cache_argument(begun), **PLAIN).tolist()))
    assert torch.get_num_threads() == 2, "the parent keeps its threads"
    assert tokens(CODED) == expected[0]


def _send(pipe):
    pipe.send(tokens(CODED))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    expected = tokens(CODED)
    context = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(writer,))
    child.start()
    writer.close()
    try:
        assert reader.poll(180), "the child hangs, or has ended"
        assert reader.recv() == expected
    finally:
        child.kill()
        child.join()


# --- threads


def test_two_threads_two_strategies_one_model():
    jobs = [(s, seed, batch) for s in (CODED, PINNED) for seed in range(4) for batch in (1, 2)]
    expected = {job: tokens(*job) for job in jobs}
    found, start = {}, threading.Barrier(2)

    def work(strategy):
        start.wait()
        for job in jobs:
            if job[0] == strategy:
                found[job] = tokens(*job)

    threads = [threading.Thread(target=work, args=(s,)) for s in (CODED, PINNED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# --- exceptions


def state():
    """All that a call could leave changed, in a form to compare."""
    return (
        GenerationConfig.validate,
        GenerationMixin._prepare_cache_for_generation,
        model().generation_config.to_dict(),
        {name: (x.data_ptr(), x._version) for name, x in model().state_dict().items()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model().modules()],
        [m.training for m in model().modules()],
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("strategy", [CODED, PINNED, "kvplug:static", "disk+exact(block=8)"])
def test_an_exception_leaves_everything_as_it_was(strategy, error):
    expected, before = tokens(strategy), state()
    caches = len(living())

    def fail(ids, scores):
        if ids.shape[1] > 93:
            raise error
        return False

    with pytest.raises(error):
        model().generate(
            prompt(90), cache_implementation=strategy, stopping_criteria=[fail], **PLAIN
        )
    assert state() == before
    assert len(living()) == caches
    assert tokens(strategy) == expected


def living():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is kvplug.Cache]


# --- sessions do not meet


@pytest.mark.parametrize(
    "strategy",
    ["growing", "growing+numba", "kvplug:static", CODED, PINNED, "sinks(sinks=2, window=30)",
     "window(length=20)", "kvplug:static+int8(block=8)", "static+window(length=20)",
     "static+disk+int8(block=8)", CODED + "+reference"],
)  # fmt: skip
def test_reserved_room_is_never_read(strategy, monkeypatch):
    """Room full of what another session left, here of NaN, gives the same answers to the bit."""

    def run():
        output = model().generate(
            prompt(70, batch=2), cache_implementation=strategy, num_beams=2, output_logits=True,
            return_dict_in_generate=True, **PLAIN | {"max_new_tokens": 6},
        )  # fmt: skip
        return torch.stack(output.logits)

    def poisoned(empty):
        def poison(*args, **kwargs):
            room = empty(*args, **kwargs)
            if room.device.type == "cpu" and room.numel():
                room.fill_(torch.nan if room.is_floating_point() else torch.iinfo(room.dtype).max)
                filled.append(room.numel())
            return room

        return poison

    filled = []
    clean = run()
    for owner, name in ((OnDevice, "empty"), (kvplug.placement.disk.OnDisk, "empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    monkeypatch.setattr(package, "_floats", poisoned(package._floats))
    monkeypatch.setattr(package, "_rooms", [])
    assert torch.equal(run(), clean)
    assert filled or strategy in ("kvplug:static",), "transformers' layer fills with zeros"


# --- long life


@cache
def long_life():
    path = Path(__file__).parents[1] / "scripts" / "long_life.py"
    spec = importlib.util.spec_from_file_location("long_life", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_nothing_is_left_after_many_calls():
    """A slice of `scripts/long_life.py`, which makes a thousand."""
    result = long_life().live(generates=48, warmup=36)
    assert long_life().grown(result) == {}, json.dumps(result)


def test_what_is_left_is_noticed():
    less = {"memory": 10_000_000, "files": 0, "threads": 3}
    more = {"memory": 16_000_000, "files": 1, "threads": 2}
    grown = long_life().grown({"before": less, "after": more})
    assert grown == {"memory": 6_000_000, "files": 1}
