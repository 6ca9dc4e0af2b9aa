"""What encoding adds to a prompt, in milliseconds and in percent of the prefill, and to decoding.

Keys and values of the text's first tokens, as the model makes them, are given to each layer of a
cache, and attention reads what it gives back, as in a prefill; the rest of the model is left out,
beside whose noise the difference would be lost. What that takes beyond the exact cache, in the same
round, is what encoding costs. The exact cache measured twice says how far such a difference can be
trusted.

Then tokens come one by one, until BLOCKS blocks are full. What a step that encodes one takes beyond
the steps that do not, over the tokens of a block, is what encoding adds to a decoded token.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import kvplug
from evals.measure.bits import exact_states
from evals.measure.clock import timed
from evals.measure.interleave import interleave, pooled
from evals.rows.schema import at, failed, measured
from evals.rows.tables import by_strategy
from evals.rows.task import Task
from evals.setup.control import Same
from evals.suites import prefill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import Cache

    from evals.measure.bits import States
    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.setup.contenders import Contender

PREFILLS = 3  # of the exact cache
BLOCKS = 3  # encoded while tokens come one by one
MOST = 256  # tokens of a block
DEFAULTS: dict[str, Any] = {
    "strategies": ("int8", "k8v4", "int4", "int3", "int2", "transformers:quantized"),
    "repeats": 9,
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per context, all contenders in it; batches are of one row."""
    contenders = [*session.contenders, Same()]
    for batch, context, note in session.cells():
        if batch == 1:
            yield Task(
                f"encode/t{context}",
                f"context {context:,}",
                session.contenders[0],
                lambda cell=(context, note): measure(session, contenders, *cell),
                (PREFILLS + len(contenders)) * session.machine.prefill(context),
                3 * session.filler.exact_bytes(1, context),
                session.config.repeats * len(contenders),
            )


def measure(
    session: Session, contenders: list[Contender], context: int, note: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the prefill of the exact cache, then what each contender adds to it."""
    place = {"batch": 1, "context": context}
    prefills = interleave(
        {contenders[0]: prefill.runner(session, contenders[0], 1, context)}, PREFILLS, lambda: None
    )[contenders[0]]
    if isinstance(prefills, Exception):
        raise prefills
    whole = measured("prefill", *pooled(prefills), note=note)
    yield at(whole, **place)
    states = exact_states(session.model, contenders[0], session.ids[:context])
    rounds = interleave(
        {one: taking_in(session, one, states) for one in contenders},
        session.config.repeats,
        session.tick,
    )
    exact = rounds[contenders[0]]
    for contender in contenders[1:]:
        own = rounds[contender]
        if isinstance(own, Exception):
            yield at(failed(own), contender, **place)
            continue
        added = [1e3 * (a - b) for a, b in zip(pooled(own), pooled(exact), strict=True)]
        row = measured("encode", *added, note=note)
        yield at(row, contender, **place)
        share = row["value"] / whole["value"] / 10
        yield at(measured("encode_share", share, note=note), contender, **place)
        if samples := per_token(session, contender, states):
            yield at(measured("encode_token", *samples, note=note), contender, **place)


def taking_in(session: Session, contender: Contender, states: States) -> Callable[[], list[float]]:
    """Return what has a new cache take in the keys and values of all layers, with attention to
    them; before the first, another one, which compiles kernels.
    """
    model, warm = session.model, []
    of_layer = with_queries(session, states)

    def seconds() -> float:
        cache = contender.build(model.config, length(states))
        return timed(model.device, lambda: take_in(cache, of_layer))

    def again() -> list[float]:
        if not warm:
            warm.append(seconds())
        return [seconds()]

    return again


def per_token(session: Session, contender: Contender, states: States) -> list[float]:
    """Return milliseconds per decoded token that each of BLOCKS blocks takes; nothing of a cache
    that is not ours, or encodes nothing.
    """
    model, of_layer = session.model, with_queries(session, states)
    cache = contender.build(model.config, length(states) + BLOCKS * MOST)
    if not isinstance(cache, kvplug.Cache) or cache.strategy.codec.lossless:
        return []
    take_in(cache, of_layer)
    block, n = cache.strategy.codec.block, min(k.shape[2] for k, _ in states.values())
    encoding, others = [], []
    for i in range(BLOCKS * block):
        before = cache.stats()["blocks_encoded"]
        newest = {layer: [x[:, :, i % n, None] for x in given] for layer, given in of_layer.items()}
        seconds = timed(model.device, lambda newest=newest: take_in(cache, newest))
        (encoding if cache.stats()["blocks_encoded"] > before else others).append(seconds)
    return [1e3 * (x - median(others)) / block for x in encoding]


def with_queries(session: Session, states: States) -> dict[int, list[Tensor]]:
    """Return queries [1, Q, N, D], drawn, keys and values of each layer, in the model's dtype."""
    model = session.model
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    draw = torch.Generator(model.device).manual_seed(session.config.seed)
    return {
        layer: [
            torch.randn(1, heads, *k.shape[2:], generator=draw, device=k.device).to(model.dtype),
            k.to(model.dtype),
            v.to(model.dtype),
        ]
        for layer, (k, v) in states.items()
    }


@torch.no_grad()
def take_in(cache: Cache, of_layer: dict[int, list[Tensor]]) -> None:
    """Give each layer of a cache its keys and values, with attention to them."""
    for layer, (query, *pair) in of_layer.items():
        views = cache.update(*(x.clone() for x in pair), layer)
        causal = query.shape[2] > 1
        scaled_dot_product_attention(query, *views, is_causal=causal, enable_gqa=True)


def length(states: States) -> int:
    """Return the tokens of the longest layer."""
    return max(k.shape[2] for k, _ in states.values())


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per context."""
    made = []
    for context in sorted({row["context"] for row in rows}):
        mine = [row for row in rows if row["context"] == context]
        made.append(by_strategy(f"{context:,} tokens", mine))
    said = (
        f"Added: by keys, values and attention alone, beyond the exact cache in the same round; "
        f"median of {config['repeats']}. Share: of {PREFILLS} prefills with the exact cache. "
        f"A token decoded: steps that encode one of {BLOCKS} blocks, beyond those that do not."
    )
    return [*made[:-1], *(one._replace(notes=[said]) for one in made[-1:])]
