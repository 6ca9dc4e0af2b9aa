"""A layer whose tokens are chosen by content, per head, once attention has run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import Unseen
from ..placement.device import OnDevice
from ..retention.base import Candidates
from .buffer import Buffer, lasting
from .growing import Layer
from .newest import Newest
from .state import nest, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..attention.stored import Stored
    from .base import Slot
    from .state import State


class ScoredLayer(Layer):
    """`Layer` for `Scored` retention: heads keep different tokens, each as many.

    `update` returns views: they show a method the queries that it asks for, and fit transformers'
    mask to each layer. A method that asks has its turn when attention has read them, and nothing is
    dropped or encoded before; one that asks for none has it in `update`.

    Padding goes first, so that transformers' mask for a suffix hides what is left of it. Where rows
    are cut at different times, or padding lies in blocks, which go as wholes, that is not so: then
    the layer says itself which of its tokens are visible.
    """

    by_chunks = False

    def __init__(self, slot: Slot) -> None:
        self.retention = slot.strategy.retention
        super().__init__(slot)
        self.sinks = None  # which tokens stay is for the method to say, those of the codec too

    def _forget(self) -> None:
        super()._forget()
        self._since_eviction = 0  # tokens that retention has not judged yet
        self._scale: float | None = None
        self._prompt = 0  # column at which the prompt ends, as far as known
        self._own_mask = False  # whether transformers' mask is not right for what is held
        self.evictions = 0
        self.memory: dict[str, Tensor] = {}  # [B, H, n, ...] of the method, for the oldest n tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `Layer` does; and room for positions and queries."""
        super().lazy_initialization(key_states, value_states)
        self.positions = Buffer(OnDevice(), self.device, 16)  # [B, H, T], of blocks and tail
        self.queries = Newest()  # [B, Q, n, Dk], and their log-sum-exp

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Layer.update`; Unseen where attention has not shown the queries of the last call."""
        self._check_seen()
        return super().update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As `Layer.get_mask_sizes`, and Unseen as in `update`."""
        self._check_seen()
        return super().get_mask_sizes(query_length)

    def expect(self, tokens: int) -> None:
        self._prompt = tokens

    def kept(self) -> list[int]:
        """Tokens of each head, padding not counted, of the row that has most."""
        if not self.is_initialized or not len(self.positions):
            return []
        real = self.positions.read()["p"] >= self.padding[:, None, None]
        return real.sum(-1).amax(0).tolist()

    def asked(self) -> list[int]:
        return [self.retention.budget] * len(self.kept())

    def _check_seen(self) -> None:
        if self._unseen:
            raise Unseen(
                f"{self.retention} chooses by the queries of attention, and none came by for the "
                f"newest {self._unseen} tokens: it needs attn_implementation='sdpa', whose query a "
                "cache can see, and a model that hands it what the cache returned, as it is"
            )

    def _after_update(self, S: int) -> None:
        B, H = self.tail.tensors["k"].shape[:2]
        new = torch.arange(self.seen - S, self.seen, dtype=torch.int32, device=self.device)
        self.positions.append({"p": new.expand(B, H, S)})
        self._since_eviction += S
        super()._after_update(S)

    def settle(self) -> None:
        """As `Layer.settle`; a method that asks for queries waits on, and raises Unseen later."""
        if not self.retention.queries:
            super().settle()

    def _wanted(self, S: int) -> int:
        """As `Layer` has it; and those that a method asks for, of few at its next choice."""
        asked = self.retention.queries
        if asked and self.record_past:
            return S  # the call may be rolled back: the newest that stay are not known yet
        if asked > S:
            asked = min(asked, asked - self._spare())
        return max(asked, super()._wanted(S))

    def _spare(self) -> int:
        """How many tokens may come until the next choice; none or fewer: it is due."""
        held = len(self.tail) + len(self.blocks) * self.strategy.codec.block
        return self.retention.budget + self.retention.every - held

    def _attended(
        self, queries: Tensor | None, log_sum_exp: Tensor | None, scale: float | None
    ) -> None:
        """Take the newest queries [B, Q, n, Dk] of a call; then, or after `crop`, choose."""
        if self._unseen and self.retention.queries:
            self._scale = scale
            new = {"q": queries}
            if log_sum_exp is not None:
                new["lse"] = log_sum_exp.detach()
            n = queries.shape[2] if self.record_past else self.retention.queries
            self.queries.append(new, n)
        super()._attended(queries, log_sum_exp, scale)

    # --- columns

    def _first_visible(self, n: int = 0) -> int:
        return self._first_stored() if self.is_initialized else 0

    def _kernel_reads(self, S: int, stored: Stored) -> bool:
        return not torch.compiler.is_compiling()  # a view shows the query, and fits its own mask

    def _visible_columns(self) -> Tensor | None:
        """Which tokens held are no padding, [B, H, T]; None where the mask says it."""
        if not self._own_mask:
            return None
        return self.positions.read()["p"] >= self.padding[:, None, None]

    def _check_mask(self) -> None:
        """See whether transformers' mask, which hides the columns of padding, is right."""
        positions, padding = self.positions.read()["p"], self.padding[:, None, None]
        columns = torch.arange(self._first_stored(), self.seen, device=self.device)
        self._own_mask = bool(((columns < padding) != (positions < padding)).any())

    # --- choosing

    def _settle(self, queries: Tensor | None = None) -> None:
        wanted = self.retention.queries
        self.queries.keep(wanted)
        if self.retention.for_question and self.seen < self._prompt:
            return  # the question has not come
        spare = self._spare()
        if spare <= 0 or self.cuts_blocks:
            super()._settle(queries)
            spare = self._spare()
        # of the queries that came, so many are among the newest at the next choice
        self.queries.keep(max(0, wanted - spare))

    def _evict(self) -> None:
        if self._spare() > 0:
            return
        block, blocks = self.strategy.codec.block, len(self.blocks)
        self._check_seen()
        with torch.no_grad():
            tokens = self._candidates()
            known = dict(tokens.state)
            kept = self.retention.keep(tokens, blocks if self.cuts_blocks else None, block)
        if kept.blocks.shape[-1] < blocks:
            self.blocks.pick(kept.blocks)
        self.tail.pick(kept.tokens)
        columns = kept.tokens
        if blocks:
            offsets = torch.arange(block, device=columns.device)
            of_blocks = (kept.blocks[..., None] * block + offsets).flatten(2)
            columns = torch.cat((of_blocks, columns + blocks * block), dim=-1)
        self.positions.pick(columns)
        with lasting():
            for name, x in tokens.state.items():
                if kept.cut is not None:  # what has not been cut has not been judged
                    before = known[name] if name in known else torch.zeros_like(x)
                    x = torch.where(kept.cut.view(*kept.cut.shape, *[1] * (x.dim() - 2)), x, before)
                self.memory[name] = _pick(x, columns)
            if kept.hidden is not None:
                behind = columns.shape[-1] - kept.tokens.shape[-1]
                self.positions.read(behind)["p"].masked_fill_(kept.hidden, -1)
        if tokens.whole:
            self._own_mask = False  # no column of padding is left
        else:
            self._check_mask()
        self._since_eviction = 0
        self.evictions += 1

    def _candidates(self) -> Candidates:
        keys, values = (self._read(self._first_stored(), self.seen, side) for side in (0, 1))
        seen = self.queries.read()
        positions = self.positions.read()["p"]
        T = positions.shape[-1]
        state = {
            name: torch.cat((x, x.new_zeros(*x.shape[:2], T - x.shape[2], *x.shape[3:])), dim=2)
            for name, x in self.memory.items()
        }
        return Candidates(
            keys,
            values,
            positions,
            self.padding,
            seen.get("q"),
            seen.get("lse"),
            self._scale,
            state,
        )

    # --- taking back, and changes of the batch

    def _lost(self, n: int) -> bool:
        return self._first_stored() > 0 and n > self._since_eviction

    def _drop_last(self, n: int) -> None:
        super()._drop_last(n)
        self.positions.drop_last(n)
        self.queries.drop_last(min(n, len(self.queries)))
        self._since_eviction -= n

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        if self.is_initialized:
            self.positions.clear()
            self.queries.clear()
        super().reset()

    def state(self) -> State:
        state = super().state() | {"since_eviction": self._since_eviction, "unseen": self._unseen}
        state |= {"evictions": self.evictions, "prompt": self._prompt}
        if not self.is_initialized:
            return state
        state |= nest("queries", self.queries.read()) | {"scale": self._scale}
        return state | nest("positions", self.positions.read()) | nest("memory", self.memory)

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self._since_eviction, self._unseen = state["since_eviction"], state["unseen"]
        self.evictions, self._prompt = state["evictions"], state["prompt"]
        if self.is_initialized:
            self.positions.load(rows(state, "positions"))
            self.queries.load(rows(state, "queries"))
            self._scale = state["scale"]
            self.memory = {name: x.clone() for name, x in rows(state, "memory").items()}
            self._check_mask()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        if self.is_initialized:
            self.positions.map(change)
            self.queries.map(change)
            self.memory = {name: change(x) for name, x in self.memory.items()}


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, H, n] of x [B, H, N, ...]."""
    rows = rows.view(*rows.shape, *[1] * (x.dim() - 3))
    return x.gather(2, rows.expand(-1, -1, -1, *x.shape[3:]))
