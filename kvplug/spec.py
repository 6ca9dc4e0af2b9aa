"""Strategies as text, `sinks(sinks=4, window=1020)+int8+host`, parsed to dataclasses and back.

The grammar: stage names joined by `+`, at most one of each kind, each with optional keyword
arguments written as Python literals. What is left out takes the default, in full
`full+growing+exact+device+auto`. `@` gives another codec to single layers: `int4+int8@(0, -1)` has
8 bits in the first and in the last, 4 in all others. Between arguments `;` does for `,`, for
programs that cut what they are given at every comma, as lm-evaluation-harness does:
`sinks(sinks=4;window=1020)`. The word `auto` alone, with arguments or none, is no stage: it leaves
the choice of all stages to `choose.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import registry
from .compat import THEIR_NAMES
from .errors import SpecError, unknown
from .strategy import DEFAULTS, Auto, Strategy

if TYPE_CHECKING:
    from .codecs.base import Codec
    from .stage import Stage

PREFIX = "kvplug:"
# Whole strategies under one name. The names without prefix belong to transformers in `generate`.
PRESETS = {
    "kvplug:static": "static",
    "kvplug:sliding_window": "window",
    "kvplug:quantized": "int4",
    "kvplug:offloaded": "host",
}
# a string literal, to be stepped over, or the semicolon that stands for a comma
SEMICOLON = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|;""")


def parse(spec: str, arguments: dict[str, Any] | None = None) -> Strategy | Auto:
    """Read a spec.

    Args:
        spec: e.g. `"int4"`, `"kvplug:static"`, `"window(length=4096)+int8+host"`.
        arguments: more arguments by name (`cache_config` of `generate`), given to the stage that
            knows them; never changed. `{"group": 32}` with `"int4"` is `"int4(group=32)"`.

    Raises:
        SpecError: bad syntax, an unknown or repeated stage, an unknown, ill-typed or out-of-range
            argument, or stages that do not compose. The text names the value, what is accepted and
            the nearest match.
        MissingExtra: a stage's optional dependency is not installed.
    """
    if not isinstance(spec, str):
        raise SpecError(f"a cache strategy is a string such as 'int4+host', got {spec!r}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise SpecError(
            f"cache_config holds the arguments of {spec!r} by name, as in {{'group': 32}}; "
            f"got {arguments!r}"
        )
    body = PRESETS.get(spec, spec.removeprefix(PREFIX))
    chosen: dict[str, tuple[type[Stage], dict[str, Any]]] = {}
    by_layer: list[tuple[Codec, tuple[int, ...]]] = []
    terms = _terms(body, spec)
    if [(name, layers) for name, _, layers in terms] == [(Auto.name, None)]:
        return Auto.make(terms[0][1] | dict(arguments or {}))
    for name, given, layers in terms:
        cls = registry.find(name)
        if layers is not None:
            if cls.kind != "codec":
                raise SpecError(
                    f"{spec!r}: only codecs are given to single layers, and {name!r} is of kind "
                    f"{cls.kind}: write it without '@'"
                )
            by_layer.append((cls.make(given), layers))
            continue
        if cls.kind in chosen:
            hint = f", or give one to single layers: '{name}@0'" if cls.kind == "codec" else ""
            raise SpecError(
                f"{spec!r}: two stages of kind {cls.kind}, "
                f"{chosen[cls.kind][0].name!r} and {name!r}; give one{hint}"
            )
        chosen[cls.kind] = (cls, given)
    for kind, name in DEFAULTS.items():
        chosen.setdefault(kind, (registry.find(name), {}))
    for name, value in (arguments or {}).items():
        cls, given = _owner(name, [cls for cls, _ in chosen.values()], spec), {name: value}
        if name in chosen[cls.kind][1]:
            raise SpecError(f"{spec!r}: {name!r} is given twice, in the spec and as an argument")
        chosen[cls.kind] = (cls, chosen[cls.kind][1] | given)
    stages = {kind: chosen[kind][0].make(chosen[kind][1]) for kind in registry.KINDS}
    return Strategy(**stages, by_layer=tuple(by_layer))


def _terms(body: str, spec: str) -> list[tuple[str, dict[str, Any], tuple[int, ...] | None]]:
    """`a(x=1)+b@2` -> [("a", {"x": 1}, None), ("b", {}, (2,))].

    Python's parser reads, nothing is evaluated.
    """

    def fail(why: str) -> SpecError:
        return SpecError(
            f"cannot read cache strategy {spec!r}: {why}. "
            "Write e.g. 'sinks(sinks=4, window=1020)+int8+host'"
        )

    try:
        commas = SEMICOLON.sub(lambda found: found[1] or ",", body.strip())
        node = ast.parse(commas, mode="eval").body
    except SyntaxError as e:
        raise fail(e.msg) from None
    nodes: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        nodes.append(node.right)
        node = node.left
    nodes.append(node)
    terms = []
    for term in reversed(nodes):
        layers = None
        if isinstance(term, ast.BinOp) and isinstance(term.op, ast.MatMult):
            layers = _layers(term.right)
            if layers is None:
                raise fail(
                    f"after '@' stands the number of a layer, or several as in '@(0, -1)', not "
                    f"{ast.unparse(term.right)!r}"
                )
            term = term.left
        name, call = (term.func, term) if isinstance(term, ast.Call) else (term, None)
        if not isinstance(name, ast.Name):
            raise fail(f"{ast.unparse(term)!r} is not a stage name")
        given: dict[str, Any] = {}
        if call is not None:
            if call.args:
                raise fail(f"{ast.unparse(call)!r} has an argument without a name")
            for keyword in call.keywords:
                if keyword.arg is None:
                    raise fail(f"{ast.unparse(call)!r} unpacks arguments")
                if keyword.arg in given:
                    raise fail(f"{ast.unparse(call)!r} gives {keyword.arg!r} twice")
                try:
                    given[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError:
                    raise fail(
                        f"{keyword.arg}={ast.unparse(keyword.value)} is not a literal"
                    ) from None
        terms.append((name.id, given, layers))
    return terms


def _layers(node: ast.expr) -> tuple[int, ...] | None:
    """`3` -> (3,), `(0, -1)` -> (0, -1), anything else -> None."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    numbers = value if isinstance(value, tuple) else (value,)
    return numbers if numbers and all(type(n) is int for n in numbers) else None


def _owner(argument: str, classes: list[type[Stage]], spec: str) -> type[Stage]:
    """The one stage of the strategy that has this argument."""
    fields = {cls: [f.name for f in dataclasses.fields(cls)] for cls in classes}
    owners = [cls for cls, names in fields.items() if argument in names]
    if not owners:
        known = [name for names in fields.values() for name in names]
        raise SpecError(
            unknown(f"argument of {spec!r}:", argument, known, "" if known else "It takes none.")
        )
    if len(owners) > 1:
        names = " and ".join(repr(cls.name) for cls in owners)
        raise SpecError(f"{spec!r}: {argument!r} belongs to {names}; write it inside the spec")
    return owners[0]


def is_ours(name: Any) -> bool:
    """Whether a `cache_implementation` is left to us: any text transformers does not know."""
    return isinstance(name, str) and (name.startswith(PREFIX) or name not in THEIR_NAMES)
