"""What a bit buys: bits held per number against KL, top-1, perplexity and words found.

Each codec as it comes, and with each number of `bits` it takes, beside rivals that quantize.
Drift is measured on windows of the dataset, as in `drift`, and on a text that the model itself
makes: `new_tokens` after PROMPT tokens, sampled with the exact cache, then fed like any other.
Words are hidden and asked for as in `retrieval`, all in one text. Bits are explained in
`evals/measure/bits.py`.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from evals import rivals
from evals.measure import drift as measuring
from evals.measure import greedy
from evals.measure.bits import bits, exact_states
from evals.measure.needles import CHOICES, Haystack
from evals.rows.schema import at, measured
from evals.rows.tables import by_strategy
from evals.rows.task import Task
from evals.setup.config import ConfigError
from evals.setup.contenders import Outside, file_name, resolve
from evals.setup.model import positions
from evals.suites import drift, retrieval
from kvplug.errors import MissingExtra
from kvplug.registry import REGISTRIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.bits import States
    from evals.measure.session import Session
    from evals.rows.schema import Row
    from evals.rows.tables import Table
    from evals.setup.contenders import Contender
    from kvplug.codecs.base import Codec

PROMPT = 64  # tokens before the generated ones
DEPTHS = tuple(i / 9 for i in range(10))  # of the words hidden in one text
QUANTIZE = ("transformers:quantized", "transformers:hqq", "transformers:fp8")


def strategies() -> tuple[str, ...]:
    """Return the codecs that change numbers, by name, with each of their `bits`; then rivals: of
    transformers those that quantize, of others all.

    A codec that others extend is a family: its members are rows. One whose package is not
    installed is none.
    """
    found: dict[str, type[Codec]] = {}
    for name in REGISTRIES["codec"].names():
        try:
            found[name] = REGISTRIES["codec"].get(name)
        except MissingExtra:
            continue
    made = []
    for name, codec in found.items():
        family = any(other is not codec and issubclass(other, codec) for other in found.values())
        if codec.lossless or family:
            continue
        made.append(name)
        for f in fields(codec):
            others = f.metadata.get("choices") or () if f.name == "bits" else ()
            made += [f"{name}(bits={n})" for n in others if n != f.default]
    others = resolve(name for name in rivals.modules() if not name.startswith("transformers:"))
    caches = (other.name for other in others[1:] if not isinstance(other, Outside))
    return (*made, *QUANTIZE, *caches)


DEFAULTS: dict[str, Any] = {
    "strategies": strategies(),
    "windows": 4,
    "new_tokens": 1024,
    "trials": 4,
}
NEEDS = {"model", "text"}


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task per contender, and the controls of drift."""
    config, hay = session.config, Haystack(session)
    hay.trial(config.window, DEPTHS, 0)  # refuses a window that is too small, before any work
    limit, length = positions(session.model), PROMPT + config.new_tokens
    if limit is not None and length > limit:
        raise ConfigError(
            f"new_tokens={config.new_tokens}: accepted are 1 to {limit - PROMPT}, the model has "
            f"{limit:,} positions and the prompt takes {PROMPT}"
        )
    generated = session.part(replace(config, windows=1, window=length, skip=PROMPT))

    @cache
    def text() -> torch.Tensor:
        prompt, exact = session.ids[None, :PROMPT], session.contenders[0]
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            made = greedy.continuation(session.model, exact, prompt, config.new_tokens, **how)
        return torch.cat((prompt, made), dim=1)[0]

    states = cache(lambda: exact_states(session.model, session.contenders[0], session.windows[0]))

    def one(contender: Contender) -> Iterator[dict[str, Any]]:
        yield from weighed(session, contender, states())
        yield from drift.drifted(session, contender, by_position=True)
        generated.ids = text()
        yield from on_generated(generated, contender)
        yield from found(session, hay, contender)

    place = {"batch": 1, "context": config.window}
    for contender in session.contenders:
        yield Task(
            f"pareto/{file_name(contender.name)}",
            contender.name,
            contender,
            lambda contender=contender: (at(row, **place) for row in one(contender)),
            drift.seconds(session, contender)
            + session.predict.chunks(contender, length)
            + config.trials * session.predict.chunks(contender, config.window),
            2 * session.filler.exact_bytes(1, max(length, config.window)),
            config.windows + 1 + config.trials,
            shared=True,
        )
    yield from drift.controls(session, "pareto", **place)


def weighed(session: Session, contender: Contender, states: States) -> Iterator[dict[str, Any]]:
    """Yield the bits per number."""
    counted = bits(session.model, contender, states, session.config.chunk)
    yield measured("bits", counted.held)
    yield measured("bits_further", counted.further)


def on_generated(session: Session, contender: Contender) -> Iterator[dict[str, Any]]:
    """Yield KL on the generated text, as a whole and by position."""
    kl = session.drift(contender)["kl"]
    yield measured("kl_generated", *kl.mean(1), note=f"over {kl.size} positions")
    for label, first, last in measuring.buckets(session.config):
        yield at(measured("kl_generated", *kl[:, first:last].mean(1)), case=label)


def found(session: Session, hay: Haystack, contender: Contender) -> Iterator[dict[str, Any]]:
    """Yield the share of hidden words that are found."""
    hits: list[float] = []
    for number in range(session.config.trials):
        trial = hay.trial(session.config.window, DEPTHS, number)
        found = retrieval.answers(session, contender, trial, session.config.window)
        hits += [float(one.listed) for one in found]
        session.tick()
    yield measured("retrieval", *hits, value=mean(hits), note=retrieval.NOTES["retrieval"])


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return a line per contender, the heaviest first; then KL by position, of both texts."""
    weight = {r["strategy"]: round(r["value"], 2) for r in rows if r["metric"] == "bits"}
    rows = sorted(rows, key=lambda row: -weight.get(row["strategy"], 0.0))  # controls last
    whole = by_strategy("", [row for row in rows if not row["case"]])
    said = [
        f"Bits: held per number of {config['window']:,} tokens, what is not encoded at 16 bits; "
        "further: of the second half of them.",
        drift.method(config),
        f"Generated: {config['new_tokens']:,} tokens that the model itself made, sampled at "
        f"temperature 1 with the exact cache after {PROMPT} tokens of the dataset.",
        f"Words: {config['trials'] * len(DEPTHS)} hidden in {config['window']:,} tokens each "
        f"{len(DEPTHS)} together, the likeliest of {CHOICES}; 95 % interval (Wilson).",
    ]
    return [
        whole._replace(notes=said),
        drift.by_range(rows, "kl", "KL by position, nat ↓"),
        drift.by_range(rows, "kl_generated", "KL by position, generated text, nat ↓"),
    ]
