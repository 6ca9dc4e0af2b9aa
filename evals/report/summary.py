"""What a reader takes home in twenty seconds: a line per strategy, each claim from one row."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evals.report.headline import KL_FLOOR, headline
from evals.report.retrieved import retrieved
from evals.report.runs import subject, together, where
from evals.rows.noise import INSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.report.headline import Headline
    from evals.report.runs import Run
    from evals.rows.schema import Row

CLOSE = 0.005  # a ratio this close to 1 is written as 1.00


class Claim(NamedTuple):
    """Some words, the row they rest on, its figures, and whether they tell a difference."""

    text: str
    anchor: str
    figures: str
    differs: bool
    value: float  # the smaller the better


class Line(NamedTuple):
    """What is claimed of one strategy, and the errors that stopped it."""

    strategy: str
    claims: list[Claim]
    errors: list[Row]

    @property
    def notable(self) -> bool:
        """Whether it differs from the reference by more than noise."""
        return bool(self.errors) or any(claim.differs for claim in self.claims)


class Summary(NamedTuple):
    """The lines of runs that belong together."""

    subject: str
    reference: str
    lines: list[Line]
    alike: list[str]  # strategies that do not differ from the reference
    sources: list[str]  # which run says what
    noise: list[str]


def summaries(runs: list[Run]) -> list[Summary]:
    """Return a summary per group of runs that has something to say."""
    return [said for group in together(runs) if (said := summary(group))]


def summary(runs: list[Run]) -> Summary | None:
    """Return the lines of one group, those that nothing beats in every respect first."""
    found = {metric: headline(runs, metric) for metric in ("bytes_held", "decode", "kl")}
    found = {metric: one for metric, one in found.items() if one}
    if not found:
        return None
    reference = next(iter(found.values())).run.reference
    names = dict.fromkeys(row["strategy"] for run in runs for row in run.rows)
    lines = [
        _line(name, runs, found)
        for name in names
        if name != reference and not name.startswith("control:")
    ]
    lines = [line for line in lines if line.claims or line.errors]
    if not lines:
        return None
    notable = [line for line in lines if line.notable]
    sources = [f"{ABOUT[m]}: {one.run.title}, {where(one.exact)}" for m, one in found.items()]
    noise = found["decode"].run.noise.lines() if "decode" in found else []
    front = sorted(notable, key=lambda line: any(_beats(other, line) for other in notable))
    alike = [line.strategy for line in lines if not line.notable]
    return Summary(subject(runs), reference, front, alike, sources, noise)


def _line(name: str, runs: list[Run], found: dict[str, Headline]) -> Line:
    claims = [CLAIMS[metric](name, one) for metric, one in found.items() if name in one.rows]
    own = [row for run in runs for row in run.rows if row["strategy"] == name]
    claims += _retrieval(name, runs)
    return Line(name, claims, [row for row in own if row["status"] == "failed"])


def _memory(name: str, one: Headline) -> Claim:
    row, exact = one.rows[name], one.exact
    ratio = exact["value"] / row["value"] if row["value"] else float("inf")
    text = _times(ratio, "less memory", "more memory", "same memory")
    figures = f"{row['value'] / 1e6:.1f} MB against {exact['value'] / 1e6:.1f}"
    figures += f" at {row['context']:,} tokens"
    return Claim(text, row["anchor"], figures, abs(ratio - 1) > CLOSE, row["value"])


def _speed(name: str, one: Headline) -> Claim:
    row, exact, paired = one.rows[name], one.exact, one.speedups.get(name)
    ratio = paired["value"] if paired else exact["value"] / row["value"]
    flag = _flag(one, row, ratio)
    text = _times(ratio, "faster", "slower", "same speed")
    text += f"{flag} at {row['context']:,} tokens"
    spread = f"{row['p20']:.1f}-{row['p80']:.1f}, n {row['n']}"
    figures = f"{row['value']:.1f} ms/token ({spread}) against {exact['value']:.1f}"
    differs = abs(ratio - 1) > CLOSE and INSIDE not in flag
    return Claim(text, (paired or row)["anchor"], figures, differs, row["value"])


def _flag(one: Headline, row: Row, ratio: float) -> str:
    """Return the mark of a difference inside the noise; where that is unknown, of two spreads that
    overlap.
    """
    noise, exact = one.run.noise, one.exact
    if noise.off:
        return noise.flag(row, ratio)
    overlap = row["p20"] <= exact["p80"] and exact["p20"] <= row["p80"]
    return f" {INSIDE}" if overlap else ""


def _drift(name: str, one: Headline) -> Claim:
    row = one.rows[name]
    kl = row["value"]
    text = (
        f"KL {decimal(kl)}" if kl > KL_FLOOR else f"KL below {decimal(KL_FLOOR)}" if kl else "KL 0"
    )
    figures = row["note"] or f"n {row['n']}"
    return Claim(text, row["anchor"], figures, kl > KL_FLOOR, max(kl, KL_FLOOR))


ABOUT = {"bytes_held": "memory", "decode": "speed", "kl": "drift"}
CLAIMS = {"bytes_held": _memory, "decode": _speed, "kl": _drift}


def _retrieval(name: str, runs: list[Run]) -> Iterator[Claim]:
    """Yield the mean share found, over the cases that the reference has too."""
    for run in runs:
        cells = retrieved(run)
        exact = {cell.place: cell.share for cell in cells if cell.strategy == run.reference}
        own = [cell for cell in cells if cell.strategy == name and cell.place in exact]
        if own:
            share = mean(cell.share for cell in own)
            best = mean(exact[cell.place] for cell in own)
            figures = f"{best:.0%} by the reference, mean of {len(own)} cells"
            yield Claim(f"finds {share:.0%}", own[0].anchor, figures, share != best, -share)


def _times(ratio: float, more: str, less: str, same: str) -> str:
    """Return a ratio in words.

    >>> _times(3.42, "faster", "slower", "same speed"), _times(0.9, "faster", "slower", "same")
    ('3.4x faster', '1.11x slower')
    """
    if abs(ratio - 1) <= CLOSE:
        return same
    times = ratio if ratio > 1 else 1 / ratio
    return f"{times:.{1 if times >= 2 else 2}f}x {more if ratio > 1 else less}"


def decimal(value: float) -> str:
    """Return two digits that count, without an exponent.

    >>> decimal(0.00003349), decimal(1.2534), decimal(0.0)
    ('0.000033', '1.3', '0')
    """
    return np.format_float_positional(float(f"{value:.2g}"), trim="-")


def _beats(one: Line, other: Line) -> bool:
    """Say whether a strategy is no worse in anything that both claim, and better in something."""
    pairs = list(zip(one.claims, other.claims, strict=False))
    if len(one.claims) != len(other.claims) or one.errors:
        return False
    return all(a.value <= b.value for a, b in pairs) and any(a.value < b.value for a, b in pairs)
