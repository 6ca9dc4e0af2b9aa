"""Gradients are those of `DynamicCache`, or an error: never left out."""

import pytest
import torch
from transformers import DynamicCache

import kvplug
from kvplug.compat import cache_argument
from kvplug.testing import tiny_llama
from kvplug.testing.pairs import pairwise
from kvplug.testing.tools import normal, prompt

PASS = ["growing", "static", "window(length=40)", "sinks(sinks=2, window=38)"]
REFUSE = [
    "int4(block=8, tail=8)",
    "int4(block=8, tail=8)+reference",
    "static+int8(block=8)",
    "exact(block=8)+host",
    "sinks(sinks=2, window=10)+int8(block=8)+disk",
]
PARTS = [20, 1, 1, 6]
PAIRS = pairwise({"spec": PASS, "trainable": ["", "k_proj", "v_proj"], "training": [True, False]})


def gradients(model, cache, parts=PARTS, trainable=""):
    """Of one loss over several forward passes, by name."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(trainable in name)
    model.zero_grad()
    loss = 0
    for ids in prompt(sum(parts), 2).split(parts, dim=1):
        logits = model(ids, **cache_argument(cache)).logits
        loss = loss + logits.log_softmax(-1)[..., 5].mean()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: "-".join(map(str, row.values())))
def test_exact_caches_on_the_device_pass_gradients(row):
    spec, trainable, training = row.values()
    model = tiny_llama().train(training)
    cache = kvplug.build(spec, model.config, max_cache_len=64)
    ours = gradients(model, cache, trainable=trainable)
    theirs = gradients(model, DynamicCache(config=model.config), trainable=trainable)
    assert ours.keys() == theirs.keys()
    assert any("k_proj" in name or "v_proj" in name for name in ours)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-4, atol=1e-6 + 1e-5 * x.abs().max())
    cache.reset()
    again = gradients(model, cache, trainable=trainable)
    for name, x in ours.items():
        assert torch.equal(again[name], x)


@pytest.mark.parametrize("spec", ["window(length=9)", "sinks(sinks=2, window=7)"])
def test_what_was_dropped_has_no_gradient_and_the_rest_has(spec):
    """One layer's own numbers: the gradient of a sum is one for each token that is visible."""
    layer = kvplug.build(spec, tiny_llama(rope_parameters=None).config).layers[0]
    if layer.sinks:
        layer.sinks.turn = (None, None)
    tokens = [normal(1, 2, 1, 16, seed=i).requires_grad_() for i in range(30)]
    for x in tokens:
        keys, values = layer.update(x, x)
    (keys.sum() + values.sum()).backward()
    seen = [i for i, x in enumerate(tokens) if x.grad is not None and bool((x.grad == 2).all())]
    none = [i for i, x in enumerate(tokens) if x.grad is None or not x.grad.any()]
    kept = list(range(21, 30)) if "window(" in spec else [0, 1, *range(23, 30)]
    assert seen == kept
    assert sorted(seen + none) == list(range(30))


def test_numbers_stored_with_their_graph_go_on_without():
    """Recorded first, then not: the same tokens, no graph left, the earlier one still whole."""
    for spec in PASS:
        model, ids = tiny_llama(), prompt(30)
        cache, plain = (kvplug.build(spec, model.config, max_cache_len=64) for _ in range(2))
        loss = model(ids[:, :20], **cache_argument(cache)).logits.sum()
        with torch.no_grad():
            model(ids[:, :20], **cache_argument(plain))
            for part in ids[:, 20:].split(1, dim=1):
                ours, theirs = (model(part, **cache_argument(c)).logits for c in (cache, plain))
                torch.testing.assert_close(ours, theirs)
        assert not cache.layers[0].keys.requires_grad
        loss.backward()
        expected = gradients(model, DynamicCache(config=model.config), [20])
        assert set(expected) == {name for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", REFUSE)
def test_others_refuse(spec, attention):
    """In training mode before attention runs; in evaluation mode when a gradient is asked for."""
    model = tiny_llama(attn_implementation=attention)
    cache = kvplug.build(spec, model.config, max_cache_len=64)
    said = r"passes no gradient to keys and values: .*no_grad.*'growing'"
    for part in prompt(sum(PARTS), 2).split(PARTS, dim=1):
        logits = model(part, **cache_argument(cache)).logits
        assert logits.requires_grad
    assert not cache.layers[0].keys.requires_grad
    with pytest.raises(kvplug.NoGradient, match=f"{said}|has no gradient; choose 'reference'"):
        logits.sum().backward()
    cache.reset()
    model.train()
    with pytest.raises(kvplug.NoGradient, match=rf"{said}.*model\.eval"):
        model(prompt(20, 2), **cache_argument(cache))
    assert int(cache.get_seq_length()) == 0
    with torch.no_grad():
        model(prompt(20, 2), **cache_argument(cache))
    assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize("trainable", ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"])
@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_keys_or_values_alone_are_not_forgotten(kernel, trainable):
    """The query needs no gradient in the first layer: a kernel may not take the rest for fixed."""
    model = tiny_llama()
    cache = kvplug.build(f"int8(block=8)+{kernel}", model.config)
    with pytest.raises(kvplug.NoGradient):
        gradients(model, cache, trainable=trainable)


def test_the_querys_gradient_through_encoded_blocks():
    """`reference` has it, where keys and values need none."""
    model, name = tiny_llama(num_hidden_layers=1), "layers.0.self_attn.q_proj"
    ours = gradients(model, kvplug.build("int8(block=8)+reference", model.config), [20], name)
    theirs = gradients(model, DynamicCache(config=model.config), [20], name)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", ["sinks(sinks=2, window=9)", "growing"])
def test_the_querys_gradient_where_a_kernel_reads_tokens_as_they_came(spec):
    model, ids = tiny_llama(num_hidden_layers=1), prompt(1060 if spec == "growing" else 30)
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    with torch.no_grad():
        cache = kvplug.build(spec, model.config)
        for part in (ids[:, :-2], ids[:, -2:-1]):
            model(part, **cache_argument(cache))
    model(ids[:, -1:], **cache_argument(cache)).logits[..., 5].sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


# torch's compiler, of its own `torch.autograd.Function`
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_refuses_as_an_eager_one_does(backend):
    """Forward in one graph, right; the gradient is an error when it is asked for."""
    model = tiny_llama(num_hidden_layers=1)
    caches = [kvplug.build("static+int8(block=8)", model.config, max_cache_len=48) for _ in "ab"]
    torch._dynamo.reset()
    step = torch.compile(
        lambda ids, cache: model(ids, **cache_argument(cache)).logits,
        backend=backend,
        fullgraph=True,
    )
    with torch.no_grad():
        for cache in caches:
            model(prompt(13), **cache_argument(cache))
        expected = model(prompt(1), **cache_argument(caches[0])).logits
    logits = step(prompt(1), caches[1])
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(kvplug.NoGradient, match="passes no gradient to keys and values"):
        logits.sum().backward()
    torch._dynamo.reset()
