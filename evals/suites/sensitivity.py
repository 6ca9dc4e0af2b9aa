"""What a layer's width costs: KL of keys or values of one layer at fewer bits, the rest exact.

Estimated of every layer by gradients, as `kvplug calibrate` does it (`kvplug/codecs/sensitivity`),
and measured of a few as drift is: MEASURED layers, keys and values, at LOW bits. The other side of
a layer has HIGH bits, which cost next to nothing. Both on the same windows. Strategies of the run
are not asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evals.rows.schema import at, measured
from evals.rows.tables import Table
from evals.rows.task import Task
from evals.setup.contenders import EXACT, Contender, file_name
from evals.suites import drift
from kvplug.codecs import sensitivity
from kvplug.codecs.widths import BITS, SECTION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evals.measure.session import Session
    from evals.rows.schema import Row

MEASURED = 4  # layers, from the first to the last
LOW, HIGH = 3, 8
SHOWN = (2, 3, 4)
SIDES = ("keys", "values")
DEFAULTS: dict[str, Any] = {"strategies": (EXACT,), "windows": 1}
NEEDS = {"model", "text"}


def lowered(layer: int, side: int, bits: int) -> Contender:
    """Return the strategy that stores one layer, one side of it at so many bits."""
    k, v = (bits, HIGH) if side == 0 else (HIGH, bits)
    return Contender(f"int(k_bits={k}, v_bits={v})@{layer}")


def tasks(session: Session) -> Iterator[Task]:
    """Yield the estimate of all layers, a task for each that is measured, and the controls."""
    place = {"batch": 1, "context": session.config.window}
    exact = session.contenders[0]
    yield Task(
        "sensitivity/estimated",
        "gradients",
        exact,
        lambda: (at(row, **place) for row in estimated(session)),
        3 * session.config.windows * session.machine.prefill(session.config.window),
        shared=True,
    )
    layers = session.model.config.get_text_config(decoder=True).num_hidden_layers
    of = sorted({round(i * (layers - 1) / (MEASURED - 1)) for i in range(MEASURED)})
    for layer, side in ((layer, side) for layer in of for side in (0, 1)):
        one = lowered(layer, side, LOW)
        yield Task(
            f"sensitivity/{file_name(one.name)}",
            one.name,
            one,
            lambda one=one: (at(row, **place) for row in drift.drifted(session, one)),
            drift.seconds(session, one),
            2 * session.filler.exact_bytes(1, session.config.window),
            session.config.windows,
            shared=True,
        )
    yield from drift.controls(session, "sensitivity", **place)


def estimated(session: Session) -> Iterator[dict[str, Any]]:
    """Yield what each layer's keys and values would cost at each width."""
    kl = sensitivity.measure(session.model, session.windows)[f"{SECTION}.kl"]
    for layer, sides in enumerate(kl.tolist()):
        for side, costs in enumerate(sides):
            for bits, cost in zip(BITS, costs, strict=True):
                if cost == cost:  # a layer that stores nothing has none
                    case = {"layer": layer, "side": side, "bits": bits}
                    yield at(measured("kl_estimated", cost), lowered(layer, side, bits), case=case)


def tables(config: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Return estimates, a line per layer; then what was measured beside them."""
    guessed: dict[tuple[int, int, int], float] = {}
    places: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        if row["metric"] == "kl_estimated":
            layer, side, bits = (int(row["case"][name]) for name in ("layer", "side", "bits"))
            places[row["strategy"]] = layer, side, bits
            guessed[layer, side, bits] = row["value"]
    true = {
        places[row["strategy"]]: row["value"]
        for row in rows
        if row["metric"] == "kl" and row["strategy"] in places
    }
    columns = [(side, bits) for side in (0, 1) for bits in SHOWN]
    layers = sorted({layer for layer, _, _ in guessed})
    body = [
        [str(layer), *(_figure(guessed.get((layer, *column))) for column in columns)]
        for layer in layers
    ]
    body.append(
        [
            "all",
            *(_figure(sum(guessed.get((layer, *x), 0.0) for layer in layers)) for x in columns),
        ]
    )
    beside = [
        [str(layer), SIDES[side], _figure(guessed.get((layer, side, bits))), _figure(kl)]
        for (layer, side, bits), kl in true.items()
    ]
    head = [f"{SIDES[side]}, {bits} bits" for side, bits in columns]
    return [
        Table("Estimated KL of one layer, nat ↓", ["layer", *head], body, []),
        Table(
            f"At {LOW} bits, nat ↓",
            ["layer", "side", "KL, estimated", "KL"],
            beside,
            [drift.method(config)],
        ),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
