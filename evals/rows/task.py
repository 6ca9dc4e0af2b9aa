"""One piece of a run: what is measured together, and is not measured again once it is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.setup.contenders import Contender


@dataclass(frozen=True)
class Task:
    """A piece of a suite. `rows` yields what `schema.measured` and `schema.failed` return.

    A row is the task's contender's, and of its `place`, unless it names its own (`schema.at`). An
    exception ends the task with a failed row; a task that measures several contenders yields
    `failed` for one and goes on.
    """

    key: str  # the same in every run of the same config
    title: str
    contender: Contender
    rows: Callable[[], Iterator[dict[str, Any]]]
    seconds: float  # predicted, roughly
    nbytes: int = 0  # predicted memory on top of the model
    steps: int = 1  # how often it calls `session.tick`
    place: dict[str, Any] = field(default_factory=dict)  # suite, batch, context or case of its rows
    shared: bool = False  # none of its figures is a time: it may run while other processes work
