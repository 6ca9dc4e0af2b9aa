"""Every kernel that runs here computes what three loops do."""

import dataclasses
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import naive
import numba
import pytest
import torch
from fresh import fresh

import kvplug
from kvplug.compat import cache_argument
from kvplug.kernels.base import Kernel
from kvplug.kernels.numba import Numba, process
from kvplug.kernels.numba.arguments import codes_from, codes_of
from kvplug.kernels.numba.decode import in_vectors
from kvplug.kernels.reference import Reference
from kvplug.testing import KernelConformance, tiny_llama
from kvplug.testing.kernel import dense_of, random_stored
from kvplug.testing.tools import normal, prompt

KERNELS = {"reference": Reference(), "numba": Numba()}


class TestKernels(KernelConformance):
    @pytest.fixture(params=sorted(KERNELS))
    def kernel(self, request):
        return KERNELS[request.param]


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("N", [0, 1, 2])
def test_against_three_loops(name, kind, N):
    B, H, G, S, Dk, Dv = 2, 2, 2, 2, 8, 8
    codec = kvplug.parse("int8(block=8)").codec
    stored = random_stored(codec, B=B, H=H, N=N, R=3, F=2, Dk=Dk, Dv=Dv, skip=3, seed=N)
    T = stored.length
    assert 2 + 3 + N * 8 - (3 if N else 0) == T
    query = normal(B, H * G, S, Dk, seed=1)
    bools = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(N)) < 0.5
    added = torch.where(bools, 0.5, -math.inf)
    mask = {"bool": bools, "additive": added}.get(kind)

    def visible(b, h, s, t):
        if kind == "causal":
            return 0.0 if t <= s else -math.inf
        if kind == "bool":
            return 0.0 if bools[b, 0, s, t] else -math.inf
        return float(added[b, 0, s, t]) if kind == "additive" else 0.0

    keys, values = dense_of(stored)
    expected, lse = naive.attention(query, keys, values, visible, Dk**-0.5)
    out, out_lse = KERNELS[name].attend(query, stored, mask, None, kind == "causal")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_the_suite_sees_a_wrong_kernel():
    """A kernel that forgets the scale, or the mask, or the hidden tokens, is found out."""

    class Wrong(Kernel):
        name = "wrong"

        def attend(self, query, stored, mask, scale, is_causal):
            return KERNELS["reference"].attend(query, stored, None, scale, False)

    with pytest.raises(AssertionError):
        KernelConformance().test_query_that_sees_nothing(Wrong())
    stored = random_stored(kvplug.parse("int8(block=8)").codec)
    with pytest.raises(AssertionError):
        KernelConformance().check(Wrong(), normal(1, 4, 2, 16, seed=1), stored, is_causal=True)


# --- the compiled CPU kernel


def test_threads_follow_torch():
    """One thread or many: the same answer, and Numba's own setting is left alone."""
    stored = random_stored(kvplug.parse("int4").codec, H=3, N=5, R=7, skip=9)
    query, before, answers = normal(1, 9, 1, 16, seed=1), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            numba.set_num_threads(1)
            answers.append(Numba().attend(query, stored, None, None, False)[0])
            assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-6)


def test_the_first_call_leaves_torch_its_threads():
    """Numba's pool and torch's are one, and starting it sets the number of threads of both."""
    code = (
        "import torch, kvplug; torch.set_num_threads(1)\n"
        "from kvplug.testing.tools import prompt, tiny_llama\n"
        "model = tiny_llama(); model.generate(prompt(100), cache_implementation='int8')\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    fresh(code, env={"NUMBA_NUM_THREADS": "2"})


def test_two_python_threads_at_once():
    stored = random_stored(kvplug.parse("int8").codec, N=9, R=3)
    query = normal(1, 4, 1, 16, seed=1)
    alone = Numba().attend(query, stored, None, None, False)[0]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(Numba().attend, query, stored, None, None, False) for _ in range(64)]
    assert all(torch.equal(call.result()[0], alone) for call in calls)


@pytest.mark.parametrize(
    "spec", ["int8", "int4", "k8v4", "int4(block=128)", "int(k_bits=2, v_bits=2)"]
)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_codes_become_floats_in_registers(spec, head_dim):
    codec = kvplug.parse(spec).codec
    stored = random_stored(codec, H=1, N=1, Dk=head_dim, Dv=head_dim)
    assert in_vectors.py_func(codes(stored), head_dim)
    stored = random_stored(codec, H=1, N=1, Dk=head_dim, Dv=20)
    assert not in_vectors.py_func(codes(stored), 20), "20 is no number of vectors"


def codes(stored):
    """The first block, as the kernel knows it."""
    return codes_from.py_func(codes_of(stored.codec, stored.blocks, stored.codec.block, 0))


@pytest.mark.parametrize("spec", ["int4(block=8, group=8)", "int(k_bits=8, v_bits=4)"])
def test_memory_laid_out_otherwise(spec):
    """Transposed queries and masks, blocks and tail that are slices of larger buffers."""
    codec = kvplug.parse(spec).codec
    stored = random_stored(codec, B=2, N=3, R=5)
    room = {name: torch.cat((x, x, x), 2) for name, x in stored.blocks.items()}
    tail = [torch.cat((x, x), 2)[:, :, 5:] for x in stored.tail]
    sliced = dataclasses.replace(
        stored, blocks={name: x[:, :, 3:6] for name, x in room.items()}, tail=tuple(tail)
    )
    query = normal(2, 16, 2, 4, seed=1).permute(0, 3, 2, 1)  # [2, 4, 2, 16]
    mask = (torch.rand(2, 1, stored.length, 2) < 0.7).transpose(2, 3)
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), mask[..., :1]):
        a = Reference().attend(query, stored, m, None, False)
        b = Numba().attend(query, sliced, m, None, False)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_whatever_the_defaults_of_torch():
    """The compiled code writes float32 on the CPU; another default must not make its room less."""
    stored = random_stored(kvplug.parse("int8").codec, N=3, R=5)
    query = normal(1, 4, 2, 16, seed=1)
    expected = Reference().attend(query, stored, None, None, True)[0]
    try:
        for dtype, device in ((torch.float16, "cpu"), (torch.float64, "meta")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            out, lse = Numba().attend(query, stored, None, None, True)
            assert (out.dtype, lse.dtype, out.device.type) == (torch.float32, torch.float32, "cpu")
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_large_batch_and_many_rows():
    codec = kvplug.parse("int8").codec
    stored = random_stored(codec, B=64, H=2, N=2, R=70, Dk=32, Dv=32)
    query = normal(64, 6, 21, 32, seed=1)  # 63 rows a head: two tiles of rows, the last one odd
    a, b = (k.attend(query, stored, None, None, False)[0] for k in (Reference(), Numba()))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_hidden(bad):
    stored = random_stored(kvplug.parse("int8(block=8)").codec)
    stored.tail[0][:, :, 2, 3] = bad
    query = normal(1, 4, 1, 16, seed=1)
    outs = [k.attend(query, stored, None, None, False)[0] for k in (Reference(), Numba())]
    assert torch.equal(outs[0].isnan(), outs[1].isnan())
    assert outs[1].isnan().any()


def test_a_gradient_is_refused_not_left_out():
    """Without `no_grad` the output is right; only `backward` says that there is no gradient."""
    model, cache = tiny_llama(), kvplug.build("int8", tiny_llama().config)
    model(prompt(100), **cache_argument(cache))
    logits = model(prompt(1), **cache_argument(cache)).logits
    with pytest.raises(RuntimeError, match="'numba' has no gradient; choose 'reference'"):
        logits.sum().backward()
    cache = kvplug.build("int8+reference", model.config)
    model(prompt(100), **cache_argument(cache))
    logits = model(prompt(1), **cache_argument(cache)).logits
    with pytest.raises(kvplug.NoGradient, match="passes no gradient to keys and values"):
        logits.sum().backward()
    query = model.model.layers[1].self_attn.q_proj.weight
    for weight in model.parameters():
        weight.requires_grad_(weight is query)
    cache.reset()
    model(prompt(100), **cache_argument(cache))
    model(prompt(1), **cache_argument(cache)).logits.sum().backward()
    assert query.grad.any()


def test_as_plain_python():
    """The same code uncompiled: what a debugger steps through, and a check on the compiler."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", PLAIN]
    env = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


PLAIN = "numba and (three_loops or borders or nothing or large_scores or merge) or otherwise"


def test_what_is_compiled_is_found_on_disk():
    """By the next process, which compiles nothing and writes nothing."""
    kernels = [process.compiled(function) for function in process.SIGNATURES]
    folder = Path(kernels[0].stats.cache_path)
    files = {f: f.stat().st_mtime_ns for f in folder.glob(f"*{process.sources()}*.nbc")}
    assert len(files) >= len(kernels)
    code = (
        "from kvplug.cli import main; assert main(['warmup']) == 0\n"
        "from kvplug.kernels.numba import process\n"
        "for function in process.SIGNATURES:\n"
        "    stats = process.compiled(function).stats\n"
        "    assert sum(stats.cache_hits.values()) == 1, stats\n"
        "    assert not sum(stats.cache_misses.values()), stats"
    )
    assert "compiling" not in fresh(code).stderr
    assert {f: f.stat().st_mtime_ns for f in folder.glob(f"*{process.sources()}*.nbc")} == files


@pytest.mark.parametrize("slow", [True, False])
def test_it_is_said_while_the_kernel_compiles(monkeypatch, caplog, slow):
    """After two seconds; what comes from disk is there before."""

    class Kernel:
        def compile(self, signature):
            assert signature is process.SIGNATURES[process.attend]
            until = time.monotonic() + 60 * slow
            while not caplog.records and time.monotonic() < until:
                time.sleep(0.05)

    process.compiled.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="kvplug"):
            patch.setattr(process, "njit", lambda **_: lambda function: Kernel())
            process.compiled(process.attend)
    finally:
        process.compiled.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [process.COMPILING] * slow
    for timer in (t for t in threading.enumerate() if isinstance(t, threading.Timer)):
        timer.join(1)
        assert not timer.is_alive(), "it would be said later"


def test_a_change_of_any_source_is_looked_up_under_another_name(tmp_path):
    """Numba by itself looks at the time stamp of the file with the entry point alone."""
    folder = Path(process.__file__).parent
    files = sorted(path.name for path in folder.glob("*.py"))
    assert {"attend.py", "decode.py", "products.py", "simd.py", "tiles.py"} < set(files)
    names = set()
    for changed in (None, *files):
        copy = tmp_path / str(changed)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if changed is None:
            assert process.sources(copy) == process.sources()
        else:
            (copy / changed).write_text((copy / changed).read_text() + "# changed\n")
        names.add(process.sources(copy))
    assert len(names) == len(files) + 1
