"""What always holds of a cache that is used again: reset, copied, cropped, its rows chosen."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..compat import cache_argument, output_cache
from ..retention.base import Scored
from .memory import storages_of
from .oracle import kept_whole
from .tools import GREEDY, assert_close, prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from ..cache import Cache
    from ..spec import Strategy


OPERATIONS: dict[str, tuple[Callable[[Cache], None], list[int]]] = {  # and the rows it leaves
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "index": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "mask": (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


class Reuse:
    """The part of `StrategyConformance` on a cache that has been used; its fixtures."""

    def test_reset_and_use_again(self, fresh: Callable, model: PreTrainedModel) -> None:
        """After `reset` a cache is as new, for shorter and for longer sequences."""
        used = fresh()
        model.generate(prompt(40, 2), **cache_argument(used), **GREEDY)
        for n in (9, 50):
            used.reset()
            assert int(used.get_seq_length()) == used.held() == 0
            outs = [
                model.generate(prompt(n, 2, seed=n), **cache_argument(c), **GREEDY)
                for c in (used, fresh())
            ]
            assert torch.equal(*outs)

    def test_second_generate_with_the_returned_cache(
        self, run: Callable, model: PreTrainedModel, fresh: Callable, lossless: bool
    ) -> None:
        """Two turns; a cache made by `build` and one made by `generate` are the same.

        A layout that reserves has made room for the first call, and makes more for the second.
        """
        new = {"max_new_tokens": 8}

        def first(**kwargs: Any) -> Any:
            return run(prompt(17), return_dict_in_generate=True, **new, **kwargs)

        def second(said: Tensor, cache: Any) -> Tensor:
            """All that was said, and a new question."""
            ids = torch.cat((said, prompt(9, seed=4)), 1)
            return model.generate(ids, **cache_argument(cache), **(GREEDY | new))

        made, built = first(), fresh()
        said = model.generate(prompt(17), **cache_argument(built), **(GREEDY | new))
        assert torch.equal(said, made.sequences)
        turn = second(said, built)
        assert torch.equal(second(said, output_cache(made)), turn)
        if lossless:
            plain = first(spec=None)
            assert torch.equal(second(plain.sequences, output_cache(plain)), turn)

    def test_deepcopy_and_diverge(self, fresh: Callable, model: PreTrainedModel) -> None:
        """Prefixes are reused by copying: what is done to one copy does not reach another."""
        prefix = prompt(26)
        cache = fresh()
        with torch.no_grad():
            model(prefix, **cache_argument(cache))
        ends = [torch.cat((prefix, prompt(7, seed=s)), 1) for s in (1, 2, 3)]
        apart = []
        for ids in ends:
            own = fresh()
            with torch.no_grad():
                model(prefix, **cache_argument(own))
            apart.append(model.generate(ids, **cache_argument(own), **GREEDY))
        for ids, expected in zip(ends, apart, strict=True):
            twin = copy.deepcopy(cache)  # looked at before it has made room of its own
            assert storages_of(twin).isdisjoint(storages_of(cache)), "the copy shares storage"
            assert torch.equal(model.generate(ids, **cache_argument(twin), **GREEDY), expected)
        assert twin.stats()["blocks_encoded"] >= cache.stats()["blocks_encoded"]
        assert storages_of(twin).isdisjoint(storages_of(cache)), "the copy shares storage"

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_batch_operations(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, operation: str
    ) -> None:
        """Rows are independent: choosing them after or before the prefill is the same."""
        ids, late = prompt(30, 3), fresh()
        change, rows = OPERATIONS[operation]
        early = fresh()
        with torch.no_grad():
            for i in (0, 15):
                model(ids[:, i : i + 15], **cache_argument(late))
                model(ids[rows][:, i : i + 15], **cache_argument(early))
            change(late)
            for step in range(12):
                token = prompt(1, len(rows), seed=step)
                a, b = (model(token, **cache_argument(c)).logits for c in (early, late))
                assert_close(b, a)

    def test_crop_and_go_on(
        self, strategy: Strategy, model: PreTrainedModel, fresh: Callable, lossless: bool
    ) -> None:
        """While the past is recorded a rollback leaves no trace, if `is_croppable`."""
        ids = prompt(30)
        plain, cropped = fresh(), fresh()
        with torch.no_grad():
            for cache in (plain, cropped):
                model(ids, **cache_argument(cache))
            cropped.activate_past_recording()
            for step, (guesses, removed) in enumerate([(5, 5), (4, 2), (9, 8), (1, 0), (6, 6)]):
                tokens = prompt(guesses, seed=step)
                model(tokens, **cache_argument(cropped))
                cropped.crop(-removed)
                assert (
                    int(cropped.get_seq_length()) == int(plain.get_seq_length()) + guesses - removed
                )
                if guesses > removed:
                    model(tokens[:, : guesses - removed], **cache_argument(plain))
                assert cropped.held() == plain.held()
            token = prompt(1, seed=9)
            a, b = (model(token, **cache_argument(c)).logits for c in (plain, cropped))
        assert b.isfinite().all()
        # the tokens of one call see each other in full precision, so calls that were cut otherwise
        # may have computed later layers a little differently where the codec loses something
        if strategy.lossless and kept_whole(strategy.retention, 40):
            assert_close(b, a)
        keys = [c.layers[0].keys for c in (plain, cropped)]
        if (
            plain.is_croppable
            and strategy.retention.newest is None
            and not isinstance(strategy.retention, Scored)
        ):
            assert torch.equal(keys[0][:, :, :30], keys[1][:, :, :30])
        with pytest.raises(ValueError, match=r"positive|minus"):
            cropped.crop(5)
