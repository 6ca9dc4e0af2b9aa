"""A dense oracle beside every layer of a running model.

While a `Shadow` is entered, each update of each layer of ours also goes to an `Oracle`, which keeps
every token exact and knows how far an encoded one may be from that. What the layer returns is
compared with it column by column; and attention over a view is compared with torch's own attention
over the same content, dense. Both see the keys, values and queries of the very same call, so that
nothing has to be forgiven because an earlier layer was already a little off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch

from ..attention.joined import Joined
from ..attention.mask import fit
from ..attention.stored import placed
from ..attention.view import View
from ..layers.growing import Layer
from ..layers.scored import ScoredLayer
from ..layers.static import StaticLayer
from ..layers.static_coded import StaticCodedLayer
from .chosen import ChosenOracle
from .oracle import Oracle
from .tools import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..attention.stored import Stored

FUNCTIONAL = torch.nn.functional


class Wrong(AssertionError):
    """What a cache held or gave is not what its strategy promises."""


class Shadow:
    """Watches all layers of ours, on this thread, until it is left."""

    def __init__(self, model: Any, padding: Tensor | None = None) -> None:
        """Watch; padding [B]: leading padding tokens of each row that `model` is given."""
        self.model, self.padding = model, padding
        self.oracles: WeakKeyDictionary[Any, Oracle] = WeakKeyDictionary()
        self.contents: dict[int, tuple[Any, Tensor, Tensor]] = {}  # by stored: it, keys, values
        self.positions: Tensor | None = None  # [B, S] of the tokens under way, by the model's count
        self.starts: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # [B] of first tokens
        self.contents_checked = self.attentions_checked = 0
        self.encoded = self.dropped = 0  # most columns of a layer that were, at one time
        self.forwards = 0  # of the model, since the call began

    def __enter__(self) -> Self:
        self._undo: list[Callable[[], None]] = []
        self._replace(Layer, "update", self._update)
        self._replace(StaticLayer, "update", self._update)
        for kind in (Layer, StaticLayer, StaticCodedLayer):
            for name, follow in (("crop", self._crop), ("_map", self._map), ("reset", self._reset)):
                self._replace(kind, name, follow)
        self._replace(FUNCTIONAL, "scaled_dot_product_attention", self._attention)
        hooks = [
            self.model.register_forward_pre_hook(self._count),
            self.model.register_forward_hook(self._left),
        ]
        hooks += [
            x.register_forward_pre_hook(self._positions, with_kwargs=True)
            for name, x in self.model.named_modules()
            if type(x).__name__.endswith("RotaryEmbedding") and "visual" not in name
        ]
        self._undo += [hook.remove for hook in hooks]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def _replace(self, owner: Any, name: str, follow: Callable) -> None:
        original = vars(owner)[name]

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return follow(original, *args, **kwargs)

        setattr(owner, name, replacement)
        self._undo.append(lambda: setattr(owner, name, original))

    def _count(self, *_: object) -> None:
        self.forwards += 1
        self.contents.clear()

    def _left(self, *_: object) -> None:
        self.positions = None  # an assistant's layers are watched too, its positions are not

    def _positions(self, _: Any, args: tuple, kwargs: dict) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if isinstance(positions, torch.Tensor) and positions.dim() in (2, 3):
            self.positions = positions if positions.dim() == 2 else positions[0]

    # --- layers

    def _update(
        self, original: Callable, layer: Any, keys: Tensor, values: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        oracle = self.oracles.get(layer)
        if oracle is None:
            kind = ChosenOracle if isinstance(layer, ScoredLayer) else Oracle
            oracle = self.oracles[layer] = kind(layer.strategy.retention, self._rows(keys))
            if self.positions is not None and len(self.positions) == len(keys):
                self.starts[oracle] = self.positions.gather(1, oracle.padding[:, None])[:, 0]
        if isinstance(oracle, ChosenOracle):
            oracle.look(layer)
        first, S = oracle.first_visible(), keys.shape[2]
        length, offset = layer.get_mask_sizes(S)
        exact = keys.float().clone(), values.float().clone()
        got = original(layer, keys, values, *args, **kw)
        oracle.update(*exact)
        if int(layer.get_seq_length()) != oracle.seen:
            raise Wrong(f"says {int(layer.get_seq_length())} tokens seen of {oracle.seen}")
        # a layer may keep more than is visible: sliding ones do while the mask hides the rest
        if offset != first:
            raise Wrong(f"the mask starts at column {offset}, not {first}")
        sides, pinned = oracle.visible(first)
        # a static layer returns empty room behind its tokens, to which nothing attends
        contents = [x[:, :, : oracle.seen - first] for x in as_stored(got)]
        by = self._moved(oracle, first) if pinned.any() else None
        for i, name in enumerate(("keys", "values")):
            x, content, (wanted, error) = got[i], contents[i], sides[i]
            if isinstance(x, View) and (starts := x.stored.starts) is not None:
                content = placed(x.stored.head[i].float(), content, 0, starts)
            if x.shape[2] != length:
                raise Wrong(f"announced {length} columns, gave {x.shape[2]} {name}")
            if by is not None and (rotation := layer.sinks.turn[i]):
                turned = rotation.shift(wanted, by)
                wanted = torch.where(pinned[:, None, :, None], turned, wanted)
            slack = torch.finfo(x.dtype).eps * pinned[:, None, :, None]  # sinks are turned
            self._compare(name, content, wanted, error, slack)
        if isinstance(got[0], View):
            self.contents[id(got[0].stored)] = (got[0].stored, *contents)
        oracle.follow(layer)
        begin, end, _ = layer.encoded()
        self.encoded = max(self.encoded, end - begin)
        self.dropped = max(self.dropped, first)
        self.contents_checked += 1
        return got

    def _rows(self, keys: Tensor) -> Tensor:
        """The padding of each row of a cache: beams and returned sequences repeat rows."""
        B = len(keys)
        if self.padding is None or B % len(self.padding):
            return torch.zeros(B, dtype=torch.long)
        return self.padding.repeat_interleave(B // len(self.padding))

    def _moved(self, oracle: Oracle, first: int) -> Tensor:
        """By how many positions the sinks of each row [B] stand later than they came."""
        start = self.starts.get(oracle)
        if start is None or self.positions is None or len(self.positions) != len(start):
            return first - oracle.padding
        # the newest column is oracle.seen - 1; sinks stand as many columns before it
        return self.positions[:, -1] - (oracle.seen - 1 - first) - start

    def _compare(
        self, name: str, got: Tensor, wanted: Tensor, error: Tensor, slack: Tensor
    ) -> None:
        if got.shape != wanted.shape:
            raise Wrong(f"{name} are {tuple(got.shape)}, not {tuple(wanted.shape)}")
        # decoding and the codec's bound are arithmetic in float32 themselves
        rounding = torch.where(error > 0, 1e-6 * (1 + wanted.abs()), 2 * slack * wanted.abs().max())
        over = (got - wanted).abs() - error * (1 + 1e-6) - rounding
        if not bool((over <= 0).all()):
            raise Wrong(f"{name} are {float(over.max()):.3g} further from exact than allowed")

    def _crop(self, original: Callable, layer: Any, n: Any) -> None:
        original(layer, n)
        if oracle := self.oracles.get(layer):
            oracle.crop(-int(n))
            oracle.follow(layer)

    def _map(self, original: Callable, layer: Any, change: Callable) -> None:
        original(layer, change)
        if oracle := self.oracles.get(layer):
            oracle.map(change)

    def _reset(self, original: Callable, layer: Any) -> None:
        original(layer)
        self.oracles.pop(layer, None)

    # --- attention

    def _attention(
        self,
        original: Callable,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        got = original(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
        if not isinstance(key, View):
            return got
        if not isinstance(key.stored, Joined):
            self._compare_attention(
                original, got, query, key.stored, value, attn_mask, is_causal, scale
            )
            return got
        heads = key.stored.heads
        for i, call in enumerate(key.stored.calls):
            mask = attn_mask
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
                mask = heads.of(mask, i)
            outs = heads.of(got, i), heads.of(query, i)
            own = value  # a view, of which each group has its part; else what a model made of one
            if not isinstance(value, View):
                own = heads.of(value, i)
            self._compare_attention(original, *outs, call.stored, own, mask, is_causal, scale)
        return got

    def _compare_attention(
        self,
        original: Callable,
        got: Tensor,
        query: Tensor,
        stored: Stored,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        """What attention gave, with dense attention over the same content."""
        _, keys, values = self.contents[id(stored)]
        T = keys.shape[2]
        # in float64: scores of several hundred, as T5's, cost float32 three digits
        sides = (keys, values if isinstance(value, View) else value[:, :, :T])
        others = attn_mask is not None and attn_mask.shape[-1] not in (1, stored.length)
        if others or stored.visible is not None:  # the mask is that of another layer
            attn_mask = fit(attn_mask, is_causal, stored, query.shape[1])
        mask = attn_mask if attn_mask is None else attn_mask[..., :T]
        if mask is not None and mask.is_floating_point():
            mask = mask.double()
        wanted = original(
            query.double(),
            *(x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in sides),
            attn_mask=mask, is_causal=is_causal, scale=scale,
        ).float()  # fmt: skip
        if mask is not None:  # a query that may see nothing gets anything
            hidden = torch.finfo(attn_mask.dtype).min / 2 if mask.is_floating_point() else 0
            sees = (mask > hidden).any(-1, keepdim=True)
            wanted = torch.where(sees, wanted, got.float())
        bound = TOLERANCE[query.dtype] * max(1.0, float(wanted.abs().max()))
        error = float((got.float() - wanted).abs().max())
        if not error <= bound:
            raise Wrong(f"attention is {error:.3g} from dense attention over the same content")
        self.attentions_checked += 1


def as_stored(got: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values that an update returned, dense, in float32: decoded, but not yet rounded.

    Views give what is stored, in the order in which kernels read it, others empty room too.
    """
    if not isinstance(got[0], View):
        return got[0].float(), got[1].float()
    stored = got[0].stored
    pieces = list(stored.pieces(max(stored.block_count, 1)))
    return tuple(torch.cat([x.float() for x in side], 2) for side in zip(*pieces, strict=True))
