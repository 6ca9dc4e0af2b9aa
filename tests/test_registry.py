"""Names: every built-in loads, imports are lazy, plugins are found, and what is missing says so."""

import json
import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
from fresh import fresh

import kvplug
from kvplug import registry
from kvplug.registry import KINDS, REGISTRIES, Registry
from kvplug.spec import DEFAULTS
from kvplug.stage import Stage

BUILTIN = [(kind, name) for kind, r in REGISTRIES.items() for name in r.builtin]


@pytest.mark.parametrize(("kind", "name"), BUILTIN)
def test_every_builtin_loads_and_calls_itself_so(kind, name):
    try:
        cls = REGISTRIES[kind].get(name)
    except kvplug.MissingExtra as e:
        pytest.skip(str(e))
    assert issubclass(cls, Stage)
    assert (cls.kind, cls.name) == (kind, name)
    assert cls.__doc__
    assert repr(cls()).startswith(name + "(")
    other = "placement" if kind == "kernel" else "kernel"  # `auto` alone is reserved
    assert getattr(kvplug.parse(f"{name}+{DEFAULTS[other]}"), kind) == cls()


def test_names_are_unique_over_all_kinds():
    names = [name for _, name in BUILTIN]
    assert len(names) == len(set(names)) >= 14
    assert {kind for kind, _ in BUILTIN} == set(KINDS)


def test_available_says_one_line_each():
    listed = kvplug.available()
    assert list(listed) == list(KINDS)
    for kind, name in BUILTIN:
        line = listed[kind][name]
        assert line
        assert "\n" not in line


def test_import_is_lazy():
    """Neither compilers nor optional backends nor codecs come with `import kvplug`."""
    code = (
        "import sys, json, torch, transformers\n"
        "from transformers.generation import utils\n"
        "before = set(sys.modules)\n"
        "import kvplug\n"
        "new = sorted(set(sys.modules) - before)\n"
        "kvplug.parse('int4+host')\n"
        "print(json.dumps([new, sorted(set(sys.modules) - before)]))\n"
    )
    new, later = json.loads(fresh(code).stdout)
    heavy = ("numba", "triton", "optimum", "quanto", "hqq", "pytest", "hypothesis", "datasets")
    assert not [m for m in new if m.split(".")[0] in heavy]
    for name in ("codecs.rotated", "placement.disk", "placement.host", "testing", "cli"):
        assert f"kvplug.{name}" not in new
    assert "kvplug.codecs.rotated" in later
    assert "kvplug.placement.disk" not in later


@dataclass(frozen=True)
class Twice(kvplug.Retention):
    """Keeps all, twice as proudly."""

    name: ClassVar[str] = "twice"


@pytest.fixture
def empty():
    return Registry("retention", "kvplug.no_such_group", {"full": "kvplug.retention.full:Full"})


def test_register_by_hand(empty):
    empty.register("twice", Twice)
    empty.register("twice", Twice)  # the same again: nothing happens
    assert empty.get("twice") is Twice
    with pytest.raises(kvplug.SpecError, match="the name 'full' is taken by retention kvplug"):
        empty.register("full", Twice)


def test_unknown_name(empty):
    with pytest.raises(
        kvplug.SpecError,
        match=r"unknown retention 'fulll'\. Did you mean 'full'\? Known: full\. "
        r"Plugins register in entry-point group 'kvplug\.no_such_group'\.",
    ):
        empty.get("fulll")


def test_missing_extra_says_the_command(empty, monkeypatch, tmp_path):
    (tmp_path / "needs_it.py").write_text("import a_backend_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.EXTRAS, "a_backend_nobody_has", "backend")
    empty.register("extra", "needs_it:Stage")
    with pytest.raises(kvplug.MissingExtra) as e:
        empty.get("extra")
    assert str(e.value) == (
        "retention 'extra' needs 'a_backend_nobody_has': pip install 'kvplug[backend]'"
    )
    assert isinstance(e.value, ImportError)
    monkeypatch.setitem(REGISTRIES["retention"]._targets, "extra", "needs_it:Stage")
    assert "pip install 'kvplug[backend]'" in kvplug.available()["retention"]["extra"]


def test_the_plugins_own_import_error_passes_through(empty, monkeypatch, tmp_path):
    (tmp_path / "has_a_bug.py").write_text("import a_module_that_is_misspelt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    empty.register("buggy", "has_a_bug:Stage")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_misspelt") as e:
        empty.get("buggy")
    assert not isinstance(e.value, kvplug.KvplugError)


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (dict, "retention 'odd' is <class 'dict'>, not a kvplug.Retention"),
        (kvplug.Codec, "not a kvplug.Retention"),
        (
            Twice,
            "retention registered as 'odd' calls itself 'twice': its spec would not parse back",
        ),
    ],
)
def test_wrong_class(empty, monkeypatch, cls, text):
    module = types.ModuleType("odd_plugin")
    module.Odd = cls
    monkeypatch.setitem(sys.modules, "odd_plugin", module)
    empty.register("odd", "odd_plugin:Odd")
    with pytest.raises(kvplug.SpecError) as e:
        empty.get("odd")
    assert text in str(e.value)


@pytest.fixture
def entry(monkeypatch):
    """Pretends that these entry points of one group are installed; forgets them afterwards."""

    def pretend(group, **targets):
        points = [EntryPoint(name, value, group) for name, value in targets.items()]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [p for p in points if p.group == group]
        )
        for r in REGISTRIES.values():
            monkeypatch.setattr(r, "_scanned", False)
            monkeypatch.setattr(r, "_targets", dict(r._targets))

    return pretend


def test_entry_point_is_found(entry):
    entry("kvplug.retention", twice=f"{__name__}:Twice")
    assert kvplug.parse("twice+int4").retention == Twice()
    assert kvplug.available()["retention"]["twice"] == "Keeps all, twice as proudly."


def test_builtin_wins_a_clash_and_says_so(entry):
    entry("kvplug.retention", window=f"{__name__}:Twice", int8=f"{__name__}:Twice")
    with pytest.warns(UserWarning, match="ignored: a") as warned:
        names = REGISTRIES["retention"].names()
    assert [str(w.message) for w in warned] == [
        f"retention 'window' from '{__name__}:Twice' ignored: a retention has the name",
        f"retention 'int8' from '{__name__}:Twice' ignored: a codec has the name",
    ]
    assert "int8" not in names
    assert REGISTRIES["retention"].get("window").__module__ == "kvplug.retention.window"


def test_a_broken_plugin_hides_no_other(entry):
    entry("kvplug.codecs", broken="no_such_module_anywhere:Thing")
    listed = kvplug.available()["codec"]
    assert listed["broken"].startswith("unavailable: ")
    assert not listed["int4"].startswith("unavailable")
    assert kvplug.parse("int4").codec.name == "int4"
