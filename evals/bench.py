"""What every suite measures on: the model, the text, and what the exact cache made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from evals import data, drift, energy, greedy, model, strategies, suites
from evals.fill import Filler
from evals.machine import Machine
from evals.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evals.config import Config
    from evals.strategies import Strategy


@dataclass
class Bench:
    """Loaded once per run; what takes long is computed when first asked for."""

    config: Config
    strategies: list[Strategy]  # the exact cache first
    device: torch.device
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    text: str = ""
    ids: torch.Tensor | None = None  # [N], the tokens of the text
    fingerprints: dict[str, str] = field(default_factory=dict)  # of model and dataset
    tick: Callable[[], None] = lambda: None  # set by the run: a step of the present task is done
    save: Callable[..., None] = lambda *_, **__: None  # set by the run: `Results.save`

    @classmethod
    def prepare(cls, config: Config, needs: set[str], console: Console) -> Bench:
        """Check the strategies, then load what a suite needs."""
        rows = strategies.resolve(config.strategies)
        config = replace(config, strategies=tuple(row.name for row in rows))
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = cls(config, rows, device)
        need = max(part.tokens for part in suites.parts(config).values())
        if "text" in needs:
            with console.status("taking the data"):
                corpus = data.load(config.dataset, need)
            if corpus.notice:
                console.print(corpus.notice, style="yellow", markup=False)
            # What the default came out as, so that the hash tells WikiText-2 from other text.
            bench.config = config = replace(config, dataset=config.dataset or corpus.name)
            bench.fingerprints["dataset"] = corpus.fingerprint
        if "model" in needs:
            with console.status(f"fetching and loading the model {config.model!r}"):
                bench.model, bench.tokenizer, name = model.load(config.model, config.dtype)
            bench.fingerprints["model"] = name
            bench.device = bench.model.device
        if "text" in needs:
            bench.text = corpus.text
            bench.ids = corpus.tokens(bench.tokenizer, need).to(bench.device)
        return bench

    def part(self, config: Config) -> Bench:
        """Return a bench for another suite of the same run: the same model, text and machine."""
        rows = strategies.resolve(config.strategies)
        part = replace(
            self,
            config=replace(config, dataset=self.config.dataset),
            strategies=rows,
            tick=lambda: self.tick(),  # what the run sets later
            save=lambda *args, **kwargs: self.save(*args, **kwargs),
        )
        part.machine, part.filler, part.pace = self.machine, self.filler, self.pace
        part.meter = self.meter
        return part

    def forget(self) -> None:
        """Free what the exact cache made of the text, which may be gigabytes."""
        for name in ("exact", "exact_tokens"):
            self.__dict__.pop(name, None)

    @property
    def placement(self) -> str:
        """The devices that compute."""
        return model.placement(self.model) if self.model else str(self.device)

    def prompt(self, batch: int, context: int) -> torch.Tensor:
        """Return the text's first tokens as [batch, context]."""
        return self.ids[: batch * context].view(batch, context)

    @property
    def windows(self) -> torch.Tensor:
        """The text's first tokens as [windows, window]."""
        return self.ids[: self.config.windows * self.config.window].view(self.config.windows, -1)

    @cached_property
    def machine(self) -> Machine:
        """The machine's speed with this model."""
        return Machine(self.model)

    @cached_property
    def meter(self) -> Callable[[], float] | None:
        """Reads joules, where the machine counts them."""
        return energy.meter(self.device)

    @cached_property
    def filler(self) -> Filler:
        """Fills caches of this model."""
        return Filler(self.model, self.config.seed)

    @cached_property
    def pace(self) -> Pace:
        """Predicts how long strategies take."""
        return Pace(self.machine, self.filler, self.config.chunk)

    @cached_property
    def exact(self) -> list[list[torch.Tensor]]:
        """The exact cache's log-probabilities, per window and chunk [P, V]."""
        return drift.exact_predictions(
            self.model, self.strategies[0], self.windows, self.config, self.tick
        )

    def drift(self, strategy: Strategy) -> dict[str, Any]:
        """Return a strategy's drift by position."""
        return drift.measure(self.model, strategy, self.windows, self.exact, self.config, self.tick)

    @cached_property
    def exact_tokens(self) -> torch.Tensor:
        """What the exact cache says after the prompt, greedily: [B, new_tokens]."""
        return self.greedy_tokens(self.strategies[0])

    def greedy_tokens(self, strategy: Strategy) -> torch.Tensor:
        """Return what a strategy says after the prompt: [B, new_tokens]."""
        prompt = self.prompt(self.config.batch[0], self.config.context[0])
        return greedy.tokens(self.model, strategy, prompt, self.config.new_tokens)

    def cells(self) -> Iterator[tuple[int, int, str | None]]:
        """Yield batch, context and a note: contexts that the model can hold, longest last.

        A longer one than the model was made for is cut to leave room for the decode steps.
        """
        steps = self.config.warmup + self.config.decode_steps
        text = self.model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None)
        for batch in self.config.batch:
            seen = set()
            for asked in self.config.context:
                context = asked if limit is None else min(asked, limit - steps)
                if context < asked:
                    note = (
                        f"{asked:,} tokens asked, {context:,} fit the model's {limit:,} positions"
                    )
                else:
                    note = None
                if context > 0 and context not in seen:
                    seen.add(context)
                    yield batch, context, note

    def answer_seconds(self, strategy: Strategy, batch: int, context: int, steps: int) -> float:
        """Predict a prefill in one forward, and decode steps after it."""
        return batch * self.machine.prefill(context) + steps * self.pace.step(
            strategy, batch, context
        )
