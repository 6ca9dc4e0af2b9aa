"""Whole models on a CUDA device: skipped where there is none.

`python -m pytest tests/test_cuda.py tests/test_triton.py` is what a machine with a GPU runs.
"""

import copy

import pytest
import torch

import kvplug
from kvplug.compat import cache_argument
from kvplug.testing.tools import left_padded, prompt, tiny_llama

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

LOSSLESS = ["growing", "kvplug:static", "exact(block=16)+host", "exact(block=16)+disk"]
CODED = [
    "int8",
    "int4",
    "int2",
    "int(k_bits=8, v_bits=4)",
    "static+int4",
    "window(length=100)+int8",
    "sinks(sinks=4, window=96)+int4",
]
PLACED = ["int4+host", "int8+disk", "sinks(sinks=4, window=96)+int4+host"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(head_dim=64).cuda()


def logits(model, spec, chunks=(150, 1, 1, 40, 1, 1, 1), batch=2):
    """Next-token scores [B, T, V] of a prompt fed in pieces, and the cache."""
    ids = prompt(sum(chunks), batch).cuda()
    cache = kvplug.build(spec, model.config, max_cache_len=256)
    with torch.no_grad():
        pieces = [
            model(piece, **cache_argument(cache), use_cache=True).logits
            for piece in ids.split(chunks, dim=1)
        ]
    return torch.cat(pieces, 1), cache


def close(a, b, atol=2e-3):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=atol * float(b.abs().max()))


@pytest.mark.parametrize("spec", LOSSLESS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_lossless_is_equal_to_the_dynamic_cache(model, spec, how):
    inputs = {"input_ids": prompt(90).cuda()}
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False, **how)
    found = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, cache_implementation=spec, **how
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", [*LOSSLESS, "int8", "sinks(sinks=2, window=200)+int8"])
def test_left_padded_rows_are_what_they_are_alone(model, spec):
    rows = [prompt(n, seed=n)[0] for n in (90, 60)]
    batch = {name: x.cuda() for name, x in left_padded(rows).items()}
    how = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": spec}
    together = model.generate(**batch, **how)[:, 90:]
    for row, answer in zip(rows, together, strict=True):
        alone = model.generate(input_ids=row[None].cuda(), **how)[0, len(row) :]
        assert torch.equal(alone, answer)


@pytest.mark.parametrize("spec", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_reads_what_the_reference_reads(model, spec, dtype):
    model = copy.deepcopy(model).to(dtype)
    found, cache = logits(model, spec)
    expected, _ = logits(model, f"{spec}+reference")
    stats = cache.stats()
    assert set(stats["kernels"]) == {"triton"}
    assert stats["materialised"] == {}
    close(found.float(), expected.float(), 2e-3 if dtype == torch.float32 else 6e-2)


@pytest.mark.parametrize("spec", PLACED)
def test_blocks_elsewhere_are_the_blocks_here(model, spec):
    """Bit for bit, fetched ahead or not."""
    here = spec.rpartition("+")[0]
    found, cache = logits(model, spec)
    assert torch.equal(found, logits(model, here)[0])
    if spec.endswith("host"):
        blocks = cache.layers[0].blocks.read()
        assert all(x.is_pinned() and not x.is_cuda for x in blocks.values())


def test_fetched_ahead_is_complete_under_load(model):
    """Long blocks travel while kernels run: what attention reads has arrived."""
    chunks = (4000, *[1] * 8)
    assert torch.equal(*(logits(model, spec, chunks, 4)[0] for spec in ("int8+host", "int8")))


@pytest.mark.parametrize("spec", ["growing", "int4", "int8+host"])
def test_copies_and_changes_of_the_batch(model, spec):
    _, cache = logits(model, spec)
    twin = copy.deepcopy(cache)
    token = prompt(1, 2, seed=3).cuda()
    with torch.no_grad():
        first = model(token, **cache_argument(cache)).logits
        second = model(token, **cache_argument(twin)).logits
        assert torch.equal(first, second)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        swapped = model(token.flip(0), **cache_argument(cache)).logits
    close(swapped.flip(0), first)


@pytest.mark.parametrize("spec", ["static", "static+int8"])
def test_one_graph_decodes(model, spec):
    """`torch.compile(fullgraph=True)` gives what eager gives, and compiles once for all lengths."""
    expected, _ = logits(model, spec, (60, 1, 1, 1, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    ids = prompt(65, 2).cuda()
    cache = kvplug.build(spec, model.config, max_cache_len=256)
    with torch.no_grad():
        model(ids[:, :60], **cache_argument(cache))
        for i in range(60, 65):
            out = compiled(ids[:, i : i + 1], **cache_argument(cache)).logits
            close(out[:, 0], expected[:, i])


def test_a_static_cache_that_is_full_says_so_before_it_writes(model):
    with pytest.raises(kvplug.CacheOverflow, match="max_cache_len >= 257"):
        logits(model, "static", (256, 1))
