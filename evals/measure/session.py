"""What every suite measures on: the model, the text, and what the exact cache made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from evals.measure import drift, energy, greedy
from evals.measure.fill import Filler
from evals.measure.machine import Machine
from evals.measure.predict import Predictor
from evals.setup import data, model
from evals.setup.contenders import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from evals.setup.config import Config
    from evals.setup.contenders import Contender


@dataclass
class Session:
    """Loaded once per run; what takes long is computed when first asked for."""

    config: Config
    contenders: list[Contender]  # the exact cache first
    device: torch.device
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    text: str = ""
    ids: torch.Tensor | None = None  # [N], the tokens of the text
    fingerprints: dict[str, str] = field(default_factory=dict)  # of model and dataset
    tick: Callable[[], None] = lambda: None  # set by the run: a step of the present task is done
    save: Callable[..., None] = lambda *_, **__: None  # set by the run: `Results.save`

    @classmethod
    def prepare(cls, config: Config, needs: set[str], tokens: int, console: Console) -> Session:
        """Check the contenders, then load what a suite needs: the model, so many tokens of text."""
        found = resolve(config.strategies)
        config = replace(config, strategies=tuple(one.name for one in found))
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        session = cls(config, found, device)
        if "text" in needs:
            with console.status("taking the data"):
                corpus = data.load(config.dataset, tokens)
            if corpus.notice:
                console.print(corpus.notice, style="yellow", markup=False)
            # What the default came out as, so that the hash tells WikiText-2 from other text.
            session.config = config = replace(config, dataset=config.dataset or corpus.name)
            session.fingerprints["dataset"] = corpus.fingerprint
        if "model" in needs:
            with console.status(f"fetching and loading the model {config.model!r}"):
                session.model, session.tokenizer, name = model.load(config.model, config.dtype)
            session.fingerprints["model"] = name
            session.device = session.model.device
        if "text" in needs:
            session.text = corpus.text
            session.ids = corpus.tokens(session.tokenizer, tokens).to(session.device)
        return session

    def part(self, config: Config) -> Session:
        """Return a session for another suite of the same run: the same model, text and machine."""
        part = replace(
            self,
            config=replace(config, dataset=self.config.dataset),
            contenders=resolve(config.strategies),
            tick=lambda: self.tick(),  # what the run sets later
            save=lambda *args, **kwargs: self.save(*args, **kwargs),
        )
        part.machine, part.filler, part.predict = self.machine, self.filler, self.predict
        part.meter = self.meter
        return part

    def forget(self) -> None:
        """Free what the exact cache made of the text, which may be gigabytes."""
        for name in ("exact", "exact_tokens"):
            self.__dict__.pop(name, None)

    @property
    def devices(self) -> str:
        """Where the model is, or where tensors go if there is none, as text."""
        return model.devices(self.model) if self.model else str(self.device)

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
    def predict(self) -> Predictor:
        """Predicts how long contenders take."""
        return Predictor(self.machine, self.filler, self.config.chunk)

    @cached_property
    def exact(self) -> list[list[torch.Tensor]]:
        """The exact cache's log-probabilities, per window and chunk [P, V]."""
        return drift.exact_predictions(
            self.model, self.contenders[0], self.windows, self.config, self.tick
        )

    def drift(
        self, contender: Contender, look: Callable[[Cache], None] = lambda cache: None
    ) -> dict[str, Any]:
        """Return a contender's drift by position; `look` sees each window's cache at its end."""
        return drift.measure(
            self.model, contender, self.windows, self.exact, self.config, self.tick, look
        )

    @cached_property
    def exact_tokens(self) -> torch.Tensor:
        """What the exact cache says after the prompt, greedily: [B, new_tokens]."""
        return self.greedy_tokens(self.contenders[0])

    def greedy_tokens(self, contender: Contender) -> torch.Tensor:
        """Return what a contender says after the prompt: [B, new_tokens]."""
        prompt = self.prompt(self.config.batch[0], self.config.context[0])
        return greedy.continuation(self.model, contender, prompt, self.config.new_tokens)

    def cells(self) -> Iterator[tuple[int, int, str | None]]:
        """Yield batch, context and a note: contexts that the model can hold, longest last.

        A longer one than the model was made for is cut to leave room for the decode steps.
        """
        steps = self.config.warmup + self.config.decode_steps
        limit = model.positions(self.model)
        for batch in self.config.batch:
            seen = set()
            for asked in self.config.context:
                context = asked if limit is None else min(asked, limit - steps)
                note = None
                if context < asked:
                    fit = f"{context:,} fit the model's {limit:,} positions"
                    note = f"{asked:,} tokens asked, {fit}"
                if context > 0 and context not in seen:
                    seen.add(context)
                    yield batch, context, note
