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
from evals.measure import clock
from evals.measure.interleave import interleave, pooled, speedup
from evals.measure.memory import no_room
from evals.rows.noise import Noise
from evals.rows.schema import at, failed, measured
from evals.rows.tables import Table, grid, notes, timing
from evals.rows.task import Task
from evals.setup.contenders import Contender, Rival
from evals.setup.control import SAME
from kvplug import registry
from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row

DEFAULTS: dict[str, Any] = {
    "strategies": ("int8", "int4", "int2"),
    "context": (512, 2048, 6016),
    "repeats": 15,
}
NEEDS: set[str] = set()
REFERENCE = "torch:sdpa-float32"
LAYERS = 30  # calls in one pass, each on its own layer where it is cold
EVICT = 1 << 28  # bytes read before a cold pass


class Heads(NamedTuple):
    """Heads of a layer."""

    kv_heads: int
    queries: int  # per kv head
    head_dim: int

    def __str__(self) -> str:
        return f"{self.kv_heads} kv heads x {self.queries} queries, D {self.head_dim}"


HEADS = (Heads(3, 3, 64), Heads(8, 4, 128))


@dataclass(frozen=True)
class Sdpa(Contender):
    """torch's attention over plain tensors of one dtype."""

    dtype: str = "float32"

    @property
    def spec(self) -> str:
        """What is called."""
        return f"scaled_dot_product_attention, K, V and query in {self.dtype}"


@dataclass(frozen=True)
class Read(Contender):
    """A contender read by a kernel that may not run here."""

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


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per layer's heads, batch, length and state of the processor's caches."""
    for heads in HEADS:
        for batch in session.config.batch:
            for context in session.config.context:
                for cold in (False, True):
                    case = f"{heads}, {'cold' if cold else 'warm'}"
                    size = exact_bytes(heads, batch, context) * (LAYERS if cold else 1)
                    yield Task(
                        f"kernel/{'x'.join(map(str, heads))}/b{batch}/t{context}/"
                        f"{'cold' if cold else 'warm'}",
                        f"T {context:,}, batch {batch}, {case}",
                        TORCH[0],
                        lambda cell=(heads, batch, context, cold, case): measure(session, *cell),
                        2 + size / 1e8,
                        4 * size,
                    )


def measure(
    session: Session, heads: Heads, batch: int, context: int, cold: bool, case: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one cell."""
    place = {"batch": batch, "context": context, "case": case}
    layers = LAYERS if cold else 1
    if reason := no_room(4 * layers * exact_bytes(heads, batch, context), session.device):
        yield at(measured("attention", note=reason), TORCH[0], **place)
        return
    inputs = Inputs(heads, batch, context, layers, session.device, session.config)
    runners: dict[Contender, AttentionPass] = {s: inputs.plain(s) for s in TORCH}
    for contender in readers(session):
        try:
            runners[contender] = inputs.coded(contender)
        except (KvplugError, ImportError) as error:
            yield at(measured("attention", note=f"does not run here: {error}"), contender, **place)
        except Exception as error:  # its row says so; the others are measured
            yield at(failed(error), contender, **place)
    if cold:
        scratch = torch.ones(EVICT // 4, device=session.device)
        for runner in runners.values():
            runner.before = scratch.sum
    rounds = interleave(runners, session.config.repeats, lambda: None)
    exact = runners[TORCH[0]].attend(0).float()
    for contender, runner in runners.items():
        if isinstance(rounds[contender], Exception):
            yield at(failed(rounds[contender]), contender, **place)
            continue
        off = (runner.attend(0).float() - exact).norm() / exact.norm()
        samples = pooled(rounds[contender])
        note = f"each sample the mean of {LAYERS} calls"
        yield at(measured("attention", *samples, note=note), contender, **place)
        if ratio := speedup(rounds[contender], rounds[TORCH[0]]):
            yield at(ratio, contender, **place)
        yield at(measured("attention_error", off.item()), contender, **place)


@dataclass
class AttentionPass:
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
        self, heads: Heads, batch: int, context: int, layers: int, device: Any, config: Any
    ) -> None:
        self.heads, self.layers = heads, layers
        self.dtype = getattr(torch, config.dtype)
        generator = torch.Generator(device).manual_seed(config.seed)
        kv_heads, groups, dim = heads

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(batch, *sizes, dim, generator=generator, device=device)

        # `context` tokens are stored, the newest one comes with the query
        self.keys, self.values = draw(kv_heads, context + 1), draw(kv_heads, context + 1)
        self.query = draw(kv_heads * groups, 1)

    def plain(self, contender: Sdpa) -> AttentionPass:
        """Return torch's attention, warmed up."""
        keys, values, query = (
            x.to(getattr(torch, contender.dtype)) for x in (self.keys, self.values, self.query)
        )
        layers = [(keys.clone(), values.clone()) for _ in range(self.layers)]
        return _warm(AttentionPass(query, layers))

    @torch.no_grad()
    def coded(self, contender: Contender) -> AttentionPass:
        """Return a contender's attention over the views its cache gives, warmed up."""
        kv_heads, groups, dim = self.heads
        config = LlamaConfig(
            hidden_size=kv_heads * groups * dim,
            num_attention_heads=kv_heads * groups,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            num_hidden_layers=1,
        )
        keys, values = self.keys.to(self.dtype), self.values.to(self.dtype)
        one = contender.build(config, self.keys.shape[2])
        one.update(keys[:, :, :-1], values[:, :, :-1], 0)
        caches = [copy.deepcopy(one) for _ in range(self.layers)]  # encoding takes longer
        layers = [cache.update(keys[:, :, -1:], values[:, :, -1:], 0) for cache in caches]
        return _warm(AttentionPass(self.query.to(self.dtype), layers))


def _warm(runner: AttentionPass) -> AttentionPass:
    """Compile what is compiled at the first call."""
    with torch.no_grad():
        runner.attend(0)
    return runner


def readers(session: Session) -> Iterator[Contender]:
    """Yield every contender with every kernel; one that names its kernel with that only.

    Rivals have none.
    """
    for contender in session.contenders:
        if isinstance(contender, Rival):
            continue
        if kvplug.parse(contender.name).kernel.name != "auto":
            yield contender
            continue
        for name in registry.REGISTRIES["kernel"].names():
            if name != "auto":
                yield Read(f"{contender.name}+{name}")


def exact_bytes(heads: Heads, batch: int, context: int) -> int:
    """Return the bytes of one layer in float32."""
    return 2 * 4 * batch * heads.kv_heads * context * heads.head_dim


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a table per layer's heads, batch and state of the caches."""
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
