"""A strategy: one stage of each kind, and how it becomes concrete for a model and a layer.

`Auto` is one that is not chosen yet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import compat, registry
from .errors import SpecError
from .kernels.reference import Reference
from .layers.layout import Growing
from .stage import Stage, option
from .units import bytes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from .codecs.base import Codec
    from .kernels.base import Kernel
    from .layers.layout import Layout
    from .placement.base import Placement
    from .retention.base import Retention

DEFAULTS = {
    "retention": "full",
    "layout": "growing",
    "codec": "exact",
    "placement": "device",
    "kernel": "auto",
}
# KL to the exact cache, nat per token, that each word allows at most
ALLOWED = {"none": 0.0, "low": 0.003, "medium": 0.03}
# of a cache: a question in the prompt, questions that come later, a text that goes on
USES = ("prompt", "prefix", "stream")


@dataclass(frozen=True)
class Strategy:
    """One stage of each kind. `repr` is the spec in full, `str` the shortest; both parse back.

    by_layer: codecs that take the place of `codec` in some layers, each with the numbers of these,
        negative ones counted from the last layer.
    """

    retention: Retention
    layout: Layout
    codec: Codec
    placement: Placement
    kernel: Kernel
    by_layer: tuple[tuple[Codec, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for stage in self.stages():
            if reason := stage.conflict(self):
                raise SpecError(f"{self}: {reason}")
        numbers: set[int] = set()
        for codec, layers in self.by_layer:
            self.replace(codec=codec, by_layer=())  # must compose as well
            for n in layers:
                if n in numbers:
                    raise SpecError(f"{self}: layer {n} is named twice")
                numbers.add(n)

    def stages(self) -> list[Stage]:
        """The five stages in the order of the pipeline."""
        return [getattr(self, kind) for kind in registry.KINDS]

    @property
    def codecs(self) -> list[Codec]:
        """The codec of most layers, then those of single ones."""
        return [self.codec, *(codec for codec, _ in self.by_layer)]

    @property
    def lossless(self) -> bool:
        """Whether every layer gives back what it was given."""
        return all(codec.lossless for codec in self.codecs)

    @property
    def is_coded(self) -> bool:
        """Whether a codec changes what some layer holds on the device."""
        return any(codec.cuts_blocks for codec in self.codecs)

    def replace(self, **stages: Stage | tuple) -> Strategy:
        """The same strategy with some stages exchanged."""
        return dataclasses.replace(self, **stages)

    def with_room(self, tokens: int) -> Strategy:
        """The same strategy, whose static layout reserves room for `tokens`."""
        return self.replace(layout=dataclasses.replace(self.layout, max_cache_len=tokens))

    def resolve(
        self,
        config: PreTrainedConfig,
        *,
        max_cache_len: int | None = None,
        open_ended: bool = False,
    ) -> Strategy:
        """The strategy for a model of this config; what is concrete already stays.

        Args:
            config: of the model.
            max_cache_len: tokens that a layout reserves which does not say how many itself.
            open_ended: nobody knows how long a sequence becomes, as with an assistant, which a call
                tells one round at a time: room grows, whatever the layout.

        `auto` stays a kernel: each layer asks for one with the device and the dtype of its first
        tokens, and layers may lie on several devices.

        Raises SpecError where the strategy lacks something, or cannot serve such a model.
        """
        layout = Growing() if open_ended else self.layout.resolve(max_cache_len)
        strategy = self._concrete(config).replace(layout=layout)
        attention = compat.attention(config)
        if self.retention.queries and attention not in (None, "sdpa"):
            raise SpecError(
                f"{self}: attn_implementation={attention!r} shows a cache no queries, by which "
                f"{self.retention.name!r} chooses; load the model with 'sdpa', or take a method "
                "that looks at none, such as 'keydiff'"
            )
        if self.retention.heads is not None and attention not in (None, "sdpa"):
            raise SpecError(
                f"{self}: heads that hold different numbers of tokens are no dense tensor, which "
                f"attn_implementation={attention!r} reads; load the model with 'sdpa', or leave "
                "out heads="
            )
        if not compat.reads_dense_only(config):
            return strategy
        if self.is_coded or not self.placement.on_device:
            raise SpecError(
                f"{self}: attn_implementation='flex_attention' compiles attention, which reads "
                "dense tensors only; choose 'sdpa', or a strategy with exact+device"
            )
        return strategy.replace(kernel=Reference())  # whose layers return tensors and no views

    def _concrete(self, config: PreTrainedConfig) -> Strategy:
        """The same with a concrete codec in each layer."""
        if all(codec.is_concrete for codec in self.codecs):
            return self
        layers = compat.cache_layers(config)
        own = self.named(layers)
        asked = [own.get(i, self.codec) for i in range(layers)]
        found: dict[int, Codec] = {}
        for codec in dict.fromkeys(asked):
            of = [i for i, x in enumerate(asked) if x == codec]
            found |= zip(of, codec.resolve(config, of), strict=True)
        plain = [x for i, x in found.items() if i not in own] or [*found.values()]
        most = max(plain, key=plain.count)
        others = {x: tuple(i for i in range(layers) if found[i] == x) for x in found.values()}
        return self.replace(
            codec=most, by_layer=tuple((x, numbers) for x, numbers in others.items() if x != most)
        )

    def at(self, layer_idx: int, layers: int) -> Strategy:
        """The strategy of one layer of a model that has so many.

        Raises SpecError where the model has no layer of a number named, or one is named twice.
        """
        codec = self.named(layers).get(layer_idx, self.codec)
        retention = self.retention.at(layer_idx, layers)
        if not self.by_layer and retention is self.retention:
            return self
        return self.replace(retention=retention, codec=codec, by_layer=())

    def named(self, layers: int) -> dict[int, Codec]:
        """The codecs of single layers of a model that has so many; errors as in `at`."""
        found: dict[int, Codec] = {}
        for codec, numbers in self.by_layer:
            for n in numbers:
                if not -layers <= n < layers:
                    raise SpecError(
                        f"{self}: there is no layer {n} in a model of {layers}: they are 0 to "
                        f"{layers - 1}, or -1 to -{layers} from the last one"
                    )
                if n % layers in found:
                    raise SpecError(
                        f"{self}: layer {n % layers} of {layers} is named twice, once as {n}"
                    )
                found[n % layers] = codec
        return found

    def __repr__(self) -> str:
        return "+".join([*map(repr, self.stages()), *self._by_layer(repr)])

    def __str__(self) -> str:
        words = [str(stage) for stage in self.stages() if str(stage) != DEFAULTS[stage.kind]]
        return "+".join([*words, *self._by_layer(str)]) or DEFAULTS["layout"]

    def _by_layer(self, write: Callable[[Codec], str]) -> list[str]:
        """`int8@(0, 29)`, `int8@0`."""
        return [
            f"{write(codec)}@{numbers[0] if len(numbers) == 1 else numbers}"
            for codec, numbers in self.by_layer
        ]


@dataclass(frozen=True)
class Auto(Stage):
    """The whole strategy: the first that fits of exact, then of what `drift` allows to lose.

    Lossy strategies are never chosen without leave, and tokens let go only where `use` says what
    for: `kvplug.recommend` explains both.
    """

    kind: ClassVar[str] = "strategy"
    name: ClassVar[str] = "auto"
    budget: str | None = option(None, "bytes it may hold, as '2GiB'; None: 0.8 of what is free")
    use: str | None = option(None, "what for, or no token goes", choices=USES)
    drift: str = option("none", "what may be lost: KL up to 0, 0.003, 0.03", choices=(*ALLOWED,))
    calibration: str | None = option(None, "file of `kvplug calibrate`, for use='prefix', 'stream'")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            bytes_of(self.budget)
