"""What every stage of a strategy is: a frozen dataclass whose repr parses back to it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, ClassVar

from .errors import SpecError, unknown

if typing.TYPE_CHECKING:
    from .spec import Strategy


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    choices: tuple | None = None,
    passing: bool = False,
) -> Any:
    """A stage argument: its default, one line of documentation, and the values it accepts.

    passing: its repr leaves the default out, as reprs did before there was the argument.
    """
    metadata = {"doc": doc, "ge": ge, "choices": choices, "passing": passing}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline retention -> layout -> codec -> placement -> kernel.

    Subclasses are frozen dataclasses. Their fields are the arguments a user may write in a spec;
    types come from the annotations, ranges and choices from `option`. Instances hold no tensors:
    one stage may serve many caches.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            where = f"{self.name}({field.name}={value!r})"
            if not _is_a(value, hints[field.name]):
                raise SpecError(f"{where}: {field.name} must be {_type_name(hints[field.name])}")
            if value is None:
                continue
            ge, choices = field.metadata.get("ge"), field.metadata.get("choices")
            if ge is not None and value < ge:
                raise SpecError(f"{where}: {field.name} must be at least {ge}")
            if choices is not None and value not in choices:
                raise SpecError(
                    f"{where}: {field.name} must be one of {', '.join(map(repr, choices))}"
                )

    def __init_subclass__(cls) -> None:
        # `@dataclass` leaves a class's own repr alone: plugins need no `repr=False`
        cls.__repr__ = Stage.__repr__

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if not f.metadata.get("passing") or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(shown)})"

    def __str__(self) -> str:
        """The short spelling: only what differs from the defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def conflict(self, strategy: Strategy) -> str | None:
        """Why this stage cannot work with the others of `strategy`, or None."""
        return None

    @classmethod
    def make(cls, arguments: dict[str, Any]) -> Stage:
        """Build from named arguments, or say which one is not known."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in arguments:
            if name not in known:
                raise SpecError(
                    unknown(
                        f"argument of {cls.name!r}:", name, known, "" if known else "It takes none."
                    )
                )
        return cls(**arguments)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; a bool is not an int, an int is a float."""
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, bool):
        return bool in accepted
    return isinstance(value, accepted) or (float in accepted and isinstance(value, int))


def _type_name(hint: Any) -> str:
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join("None" if a is type(None) else a.__name__ for a in accepted)
