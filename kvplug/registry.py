"""Short names -> stage classes, imported when asked for; third parties add by entry point."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from .errors import MissingExtra, SpecError, UnknownStage, unknown
from .stage import Stage

if TYPE_CHECKING:
    from types import ModuleType

KINDS = ("retention", "layout", "codec", "placement", "kernel")

# module that something optional imports -> extra of kvplug that installs it
EXTRAS: dict[str, str] = {
    "numba": "numba",
    "llvmlite": "numba",
    "triton": "triton",
    "redis": "store",
    "fsspec": "store",
    "prometheus_client": "store",
    "blosc2": "store",
    "optimum": "quanto",
    "optimum.quanto": "quanto",
    "hqq": "hqq",
}


def load(module: str, who: str) -> ModuleType:
    """Import `module` for `who`. Raises MissingExtra where a package lacks that an extra has."""
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        if e.name not in EXTRAS:  # a plugin's own bug: let it through
            raise
        raise MissingExtra(f"{who} needs {e.name!r}: pip install 'kvplug[{EXTRAS[e.name]}]'") from e


class Registry:
    """The stages of one kind. A target is a class, or `module:Class`, imported when asked for."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind, self.group, self.builtin = kind, group, tuple(builtin)
        self._targets: dict[str, str | type[Stage]] = dict(builtin)
        self._scanned = False

    def names(self) -> list[str]:
        """Every known name, plugins included, sorted."""
        self._scan()
        return sorted(self._targets)

    def __contains__(self, name: str) -> bool:
        if name not in self._targets:
            self._scan()
        return name in self._targets

    def get(self, name: str) -> type[Stage]:
        """The class behind `name`.

        Raises SpecError where nobody registered it, MissingExtra where its package lacks.
        """
        if name not in self:
            note = f"Plugins register in entry-point group {self.group!r}."
            raise SpecError(unknown(self.kind, name, self.names(), note))
        target = self._targets[name]
        if isinstance(target, str):
            target = self._targets[name] = self._load(name, target)
        return target

    def register(self, name: str, target: str | type[Stage]) -> None:
        """Add a stage by hand: the same again replaces it, another one is a SpecError."""
        taken = self._targets.get(name, target)
        if _origin(taken) != _origin(target):
            raise SpecError(f"the name {name!r} is taken by {self.kind} {_origin(taken)}")
        self._targets[name] = target

    def _load(self, name: str, target: str) -> type[Stage]:
        module, _, attribute = target.partition(":")
        cls = getattr(load(module, f"{self.kind} {name!r}"), attribute)
        if not (isinstance(cls, type) and issubclass(cls, Stage) and cls.kind == self.kind):
            raise SpecError(f"{self.kind} {name!r} is {cls!r}, not a kvplug.{self.kind.title()}")
        if cls.name != name:
            raise SpecError(
                f"{self.kind} registered as {name!r} calls itself {cls.name!r}: "
                "its spec would not parse back"
            )
        return cls

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for ep in entry_points(group=self.group):
            owner = next((r.kind for r in REGISTRIES.values() if ep.name in r._targets), None)
            if owner is None:
                self._targets[ep.name] = ep.value
            elif self._targets.get(ep.name) != ep.value:
                warnings.warn(
                    f"{self.kind} {ep.name!r} from {ep.value!r} ignored: a {owner} has the name",
                    stacklevel=2,
                )


def _origin(target: str | type[Stage]) -> str:
    """Where a target comes from, as `module:Class`."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


REGISTRIES: dict[str, Registry] = {
    "retention": Registry(
        "retention",
        "kvplug.retention",
        {
            "full": "kvplug.retention.full:Full",
            "window": "kvplug.retention.window:Window",
            "sinks": "kvplug.retention.sinks:Sinks",
            "snapkv": "kvplug.retention.snapkv:SnapKV",
            "expected": "kvplug.retention.expected:Expected",
            "keydiff": "kvplug.retention.keydiff:KeyDiff",
            "h2o": "kvplug.retention.h2o:H2O",
            "tova": "kvplug.retention.tova:Tova",
            "lagkv": "kvplug.retention.lagkv:LagKV",
            "pyramid": "kvplug.retention.pyramid:Pyramid",
        },
    ),
    "layout": Registry(
        "layout",
        "kvplug.layout",
        {"growing": "kvplug.layers.layout:Growing", "static": "kvplug.layers.layout:Static"},
    ),
    "codec": Registry(
        "codec",
        "kvplug.codecs",
        {
            "exact": "kvplug.codecs.exact:Exact",
            "int": "kvplug.codecs.rotated:Rotated",
            "int8": "kvplug.codecs.rotated:Int8",
            "k8v4": "kvplug.codecs.rotated:K8V4",
            "int4": "kvplug.codecs.rotated:Int4",
            "int3": "kvplug.codecs.rotated:Int3",
            "int2": "kvplug.codecs.rotated:Int2",
            "fp8": "kvplug.codecs.fp8:Fp8",
            "quanto": "kvplug.codecs.quanto:Quanto",
            "hqq": "kvplug.codecs.hqq:Hqq",
        },
    ),
    "placement": Registry(
        "placement",
        "kvplug.placement",
        {
            "device": "kvplug.placement.device:Device",
            "host": "kvplug.placement.host:Host",
            "disk": "kvplug.placement.disk:Disk",
        },
    ),
    "kernel": Registry(
        "kernel",
        "kvplug.kernels",
        {
            "auto": "kvplug.kernels.auto:Auto",
            "reference": "kvplug.kernels.reference:Reference",
            "numba": "kvplug.kernels.numba:Numba",
            "triton": "kvplug.kernels.triton:Triton",
        },
    ),
}


def find(name: str) -> type[Stage]:
    """The stage class called `name`, of whatever kind: names are unique over all kinds.

    Raises UnknownStage with the nearest match where no kind knows it.
    """
    for registry in REGISTRIES.values():
        if name in registry:
            return registry.get(name)
    known = [n for registry in REGISTRIES.values() for n in registry.names()]
    groups = ", ".join(r.group for r in REGISTRIES.values())
    raise UnknownStage(
        unknown("cache stage", name, known, f"Plugins register in entry-point groups {groups}.")
    )


def add(cls: type[Stage]) -> type[Stage]:
    """Make a stage known by its `name`, without an entry point; usable as a decorator.

    The same class defined again, as when a notebook cell runs twice, replaces itself. Raises
    SpecError where the class is no stage, or a stage of any kind has its name already.
    """
    if not (isinstance(cls, type) and issubclass(cls, Stage) and hasattr(cls, "name")):
        raise SpecError(f"{cls!r} is not a stage with a name: subclass kvplug.Codec, Scored, ...")
    owner = next((r for r in REGISTRIES.values() if cls.name in r), REGISTRIES[cls.kind])
    owner.register(cls.name, cls)
    return cls


def available() -> dict[str, dict[str, str]]:
    """Every stage by kind, with one line of documentation, or why it cannot be imported."""
    return {
        kind: {name: _one_line(registry, name) for name in registry.names()}
        for kind, registry in REGISTRIES.items()
    }


def _one_line(registry: Registry, name: str) -> str:
    try:
        return (registry.get(name).__doc__ or "").strip().partition("\n")[0]
    except Exception as e:  # a broken plugin must not hide the others
        return f"unavailable: {e}"
