"""The run: load, measure every strategy in turn, write each row as it comes, and report."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import evaluate
import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from evals import data, drift, env, greedy, model, report, speed, strategies
from evals.schema import failed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedModel

    from evals.config import Config
    from evals.strategies import Strategy


@dataclass
class Bench:
    """What all strategies are measured on, and what the exact cache, measured first, said."""

    model: PreTrainedModel
    config: Config
    prompt: torch.Tensor  # [B, T]
    windows: torch.Tensor  # [W, N]
    exact: list[list[torch.Tensor]]  # log-probabilities, per window and chunk [P, V]
    exact_tokens: torch.Tensor  # [B, new_tokens]

    @classmethod
    def prepare(
        cls, lm: PreTrainedModel, ids: torch.Tensor, config: Config, tick: Callable[[], None]
    ) -> Bench:
        """Cut prompts and windows from the text's start, and have the exact cache read them."""
        exact = strategies.resolve([])[0]
        ids = ids.to(lm.device)
        prompt = ids[: config.batch * config.context].view(config.batch, config.context)
        windows = ids[: config.windows * config.window].view(config.windows, config.window)
        kept = drift.exact_predictions(lm, exact, windows, config, tick)
        said = greedy.tokens(lm, exact, prompt, config.new_tokens)
        tick()
        return cls(lm, config, prompt, windows, kept, said)

    def measure(
        self, strategy: Strategy, tick: Callable[[], None]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ("row", measured row) and ("drift", the metric's whole answer) for one strategy."""
        for row in speed.measure(self.model, strategy, self.prompt, self.config):
            yield "row", row
        tick()
        result = drift.measure(self.model, strategy, self.windows, self.exact, self.config, tick)
        yield "drift", result
        for row in drift.rows(result):
            yield "row", row
        said = greedy.tokens(self.model, strategy, self.prompt, self.config.new_tokens)
        yield "row", greedy.agreement(said, self.exact_tokens)
        tick()


def run(config: Config, out: Path, console: Console) -> bool:
    """Measure, write `out/<config hash>/` and show the table; say whether every strategy came
    through.
    """
    rows = strategies.resolve(config.strategies)  # a wrong name ends the run here, before any work
    config = replace(config, strategies=tuple(row.name for row in rows))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    with console.status("taking the data"):
        corpus = data.load(config.dataset)
    if corpus.notice:
        console.print(corpus.notice, style="yellow", markup=False)
    with console.status(f"fetching and loading the model {config.model!r}"):
        lm, tokenizer, fingerprint = model.load(config.model, config.dtype)
    need = max(config.batch * config.context, config.windows * config.window)
    ids = corpus.tokens(tokenizer, need)

    # What the default came out as, so that the hash tells WikiText-2 from the embedded text.
    config = replace(config, dataset=config.dataset or corpus.name)
    place = env.describe(fingerprint, corpus.fingerprint, model.placement(lm), config.seed)
    folder = out / config.key
    (folder / "drift").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))
    write_json(folder / "env.json", place)

    with progress(console) as bar, (folder / "rows.jsonl").open("w", encoding="utf-8") as sink:
        ticks = config.windows + 1  # for the exact cache; a row has one more, for speed
        overall = bar.add_task("exact reference", total=ticks + len(rows) * (ticks + 1))
        bench = Bench.prepare(lm, ids, config, lambda: bar.advance(overall))
        for number, strategy in enumerate(rows, 1):
            bar.update(overall, description=f"{number}/{len(rows)} {strategy.name}")
            for kind, value in guarded(bench.measure(strategy, lambda: bar.advance(overall))):
                if kind == "drift":
                    name = re.sub(r"\W+", "-", strategy.name).strip("-")
                    evaluate.save(
                        folder / "drift" / f"{name}.json", strategy=strategy.name, **value
                    )
                else:
                    line = (
                        {"strategy": strategy.name, "spec": strategy.spec}
                        | value
                        | provenance(config, place)
                    )
                    sink.write(json.dumps(line, allow_nan=False) + "\n")
                    sink.flush()
            bar.update(overall, completed=ticks + number * (ticks + 1))

    return report.render(folder, console)


def guarded(
    measuring: Iterator[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pass measurements on; if measuring raises, that is the strategy's last row.

    Only what happens inside the measurement is caught: an error of whoever writes the rows ends the
    run.
    """
    while True:
        try:
            item = next(measuring)
        except StopIteration:
            return
        except Exception as error:  # the table shows it, and the exit code
            yield "row", failed(error)
            return
        yield item


def provenance(config: Config, place: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a row that says where its figure is from."""
    versions = {name: place["versions"][name] for name in ("kvplug", "torch", "transformers")}
    here = {name: place[name] for name in ("git", "model", "dataset", "hardware", "threads")}
    asked = {name: getattr(config, name) for name in ("dtype", "batch", "context")}
    return {
        "run": config.key,
        **versions,
        **here,
        **asked,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write strict JSON that a person can read."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """Show a bar with the strategy at work and the time gone."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        yield bar
