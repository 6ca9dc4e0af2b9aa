"""Attention alone: every kernel that runs here over every codec, against torch's own on plain K/V.

One query token per row attends to a cache, called as transformers calls it. `warm` repeats one
layer, which stays in the processor's caches if it fits; `cold` goes through the layers of a model,
as a decode step does, after something else has been read. All run in one loop, in alternating
order.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

import kvplug
from evals import clock
from evals.memory import free_bytes
from evals.noise import SAME, Noise
from evals.race import pooled, race, speedup
from evals.schema import at, failed, measured
from evals.strategies import Rival, Strategy
from evals.tables import Table, grid, notes, timing
from evals.task import Task
from kvplug import registry
from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.bench import Bench
    from evals.schema import Row

DEFAULTS: dict[str, Any] = {
    "strategies": ("int8", "int4", "int2"),
    "context": (512, 2048, 6016),
    "repeats": 15,
}
NEEDS: set[str] = set()
REFERENCE = "torch:sdpa-float32"
LAYERS = 30  # calls in one pass, each on its own layer where it is cold
EVICT = 1 << 28  # bytes read before a cold pass
SPARE = 0.9  # of the free memory that all layers may take


class Shape(NamedTuple):
    """Heads of a layer."""

    kv_heads: int
    queries: int  # per kv head
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kv_heads} kv heads x {self.queries} queries, D {self.head_dim}"


SHAPES = (Shape(3, 3, 64), Shape(8, 4, 128))


@dataclass(frozen=True)
class Sdpa(Strategy):
    """torch's attention over plain tensors of one dtype."""

    dtype: str = "float32"

    @property
    def spec(self) -> str:
        """What is called."""
        return f"scaled_dot_product_attention, K, V and query in {self.dtype}"


@dataclass(frozen=True)
class Read(Strategy):
    """A strategy read by a kernel that may not run here."""

    @property
    def spec(self) -> str:
        """The spec with every default written out, or the name where it cannot be read here."""
        try:
            return super().spec
        except Exception:  # building it says why
            return self.name


TORCH = (
    Sdpa(REFERENCE),
    Sdpa("torch:sdpa-bfloat16", "bfloat16"),
    Sdpa(SAME),
)


def tasks(bench: Bench) -> Iterator[Task]:
    """Yield a task per shape, batch, length and state of the processor's caches."""
    for shape in SHAPES:
        for batch in bench.config.batch:
            for context in bench.config.context:
                for cold in (False, True):
                    case = f"{shape}, {'cold' if cold else 'warm'}"
                    size = exact_bytes(shape, batch, context) * (LAYERS if cold else 1)
                    yield Task(
                        f"kernel/{'x'.join(map(str, shape))}/b{batch}/t{context}/"
                        f"{'cold' if cold else 'warm'}",
                        f"T {context:,}, batch {batch}, {case}",
                        TORCH[0],
                        lambda cell=(shape, batch, context, cold, case): measure(bench, *cell),
                        2 + size / 1e8,
                        4 * size,
                    )


def measure(
    bench: Bench, shape: Shape, batch: int, context: int, cold: bool, case: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one cell."""
    place = {"batch": batch, "context": context, "case": case}
    layers = LAYERS if cold else 1
    need, room = 4 * layers * exact_bytes(shape, batch, context), free_bytes(bench.device)
    if need > SPARE * room:
        reason = f"does not fit: needs {need / 1e9:.2f} GB, {room / 1e9:.2f} GB are free"
        yield at(measured("attention", note=reason), TORCH[0], **place)
        return
    inputs = Inputs(shape, batch, context, layers, bench.device, bench.config)
    runners: dict[Strategy, Runner] = {s: inputs.plain(s) for s in TORCH}
    for strategy in readers(bench):
        try:
            runners[strategy] = inputs.coded(strategy)
        except (KvplugError, ImportError) as error:
            yield at(measured("attention", note=f"does not run here: {error}"), strategy, **place)
        except Exception as error:  # its row says so; the others are measured
            yield at(failed(error), strategy, **place)
    if cold:
        scratch = torch.ones(EVICT // 4, device=bench.device)
        for runner in runners.values():
            runner.before = scratch.sum
    laps = race(runners, bench.config.repeats, lambda: None)
    exact = runners[TORCH[0]].attend(0).float()
    for strategy, runner in runners.items():
        if isinstance(laps[strategy], Exception):
            yield at(failed(laps[strategy]), strategy, **place)
            continue
        off = (runner.attend(0).float() - exact).norm() / exact.norm()
        samples = pooled(laps[strategy])
        note = f"each sample the mean of {LAYERS} calls"
        yield at(measured("attention", *samples, note=note), strategy, **place)
        if ratio := speedup(laps[strategy], laps[TORCH[0]]):
            yield at(ratio, strategy, **place)
        yield at(measured("attention_error", off.item()), strategy, **place)


@dataclass
class Runner:
    """One implementation over its layers: each call is a pass."""

    query: torch.Tensor  # [B, Q, 1, D]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [B, H, T, D], or views
    before: Any = None  # called before a pass, untimed

    def attend(self, layer: int) -> torch.Tensor:
        """Attend as transformers' sdpa attention does in a decode step."""
        keys, values = self.layers[layer]
        return scaled_dot_product_attention(self.query, keys, values, enable_gqa=True)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Return microseconds per call of one pass."""
        if self.before:
            self.before()
        order = list(islice(cycle(range(len(self.layers))), LAYERS))
        device = self.query.device
        return [1e6 / LAYERS * clock.timed(device, lambda: [self.attend(i) for i in order])]


class Inputs:
    """The same random query, keys and values for every implementation."""

    def __init__(
        self, shape: Shape, batch: int, context: int, layers: int, device: Any, config: Any
    ) -> None:
        self.shape, self.layers = shape, layers
        self.dtype = getattr(torch, config.dtype)
        generator = torch.Generator(device).manual_seed(config.seed)
        heads, groups, dim = shape

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(batch, *sizes, dim, generator=generator, device=device)

        # `context` tokens are stored, the newest one comes with the query
        self.keys, self.values = draw(heads, context + 1), draw(heads, context + 1)
        self.query = draw(heads * groups, 1)

    def plain(self, strategy: Sdpa) -> Runner:
        """Return torch's attention, warmed up."""
        keys, values, query = (
            x.to(getattr(torch, strategy.dtype)) for x in (self.keys, self.values, self.query)
        )
        layers = [(keys.clone(), values.clone()) for _ in range(self.layers)]
        return _warm(Runner(query, layers))

    @torch.no_grad()
    def coded(self, strategy: Strategy) -> Runner:
        """Return a strategy's attention over the views its cache gives, warmed up."""
        heads, groups, dim = self.shape
        config = LlamaConfig(
            hidden_size=heads * groups * dim,
            num_attention_heads=heads * groups,
            num_key_value_heads=heads,
            head_dim=dim,
            num_hidden_layers=1,
        )
        keys, values = self.keys.to(self.dtype), self.values.to(self.dtype)
        one = strategy.build(config, self.keys.shape[2])
        one.update(keys[:, :, :-1], values[:, :, :-1], 0)
        caches = [copy.deepcopy(one) for _ in range(self.layers)]  # encoding takes longer
        layers = [cache.update(keys[:, :, -1:], values[:, :, -1:], 0) for cache in caches]
        return _warm(Runner(self.query.to(self.dtype), layers))


def _warm(runner: Runner) -> Runner:
    """Compile what is compiled at the first call."""
    with torch.no_grad():
        runner.attend(0)
    return runner


def readers(bench: Bench) -> Iterator[Strategy]:
    """Yield every strategy with every kernel; one that names its kernel with that only.

    Rivals have none.
    """
    for strategy in bench.strategies:
        if isinstance(strategy, Rival):
            continue
        if kvplug.parse(strategy.name).kernel.name != "auto":
            yield strategy
            continue
        for name in registry.REGISTRIES["kernel"].names():
            if name != "auto":
                yield Read(f"{strategy.name}+{name}")


def exact_bytes(shape: Shape, batch: int, context: int) -> int:
    """Return the bytes of one layer in float32."""
    return 2 * 4 * batch * shape.kv_heads * context * shape.head_dim


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per shape, batch and state of the caches."""
    off = Noise(rows, REFERENCE)
    made = []
    for batch, case in dict.fromkeys((row["batch"], row["case"]) for row in rows):
        mine = [row for row in rows if (row["batch"], row["case"]) == (batch, case)]
        title = f"attention, us/call ↓ (times as fast as {REFERENCE} ↑), batch {batch}, {case}"
        made.append(grid(title, mine, timing("attention", ".0f", off)))
    if made:
        missing = [row for row in rows if row["metric"] == "attention" and row["value"] is None]
        said = f"{config['repeats']} rounds of {LAYERS} calls; columns: tokens stored."
        made[-1] = made[-1]._replace(notes=[said, *off.lines(), *notes(missing)])
    return made
