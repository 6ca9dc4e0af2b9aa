"""The floors of evals: every import points down, and none goes round in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"
# From the lowest up, as evals/README.md has them; the files beside them stand on top.
FLOORS = ("rivals", "metrics", "setup", "rows", "measure", "suites", "report")
MODULES = {
    ".".join(path.relative_to(EVALS.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in EVALS.rglob("*.py")
}


def imports(module):
    """Return the modules of evals that one names, wherever: also in functions, also for types.

    With each come the packages around it, which Python imports too.
    """
    named = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by dots"
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in named if name.split(".")[0] == "evals"]
    around = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}
    return around & MODULES.keys() - {module}


def floor(module):
    """Return the height of a module; what all packages share, evals itself, is below all."""
    if module == "evals":
        return -1
    name = module.split(".")[1]
    return FLOORS.index(name) if name in FLOORS else len(FLOORS)


def test_every_folder_is_a_floor():
    folders = {path.name for path in EVALS.iterdir() if list(path.glob("*.py"))}
    assert folders == set(FLOORS)


def test_imports_point_down():
    upward = [(a, b) for a in MODULES for b in sorted(imports(a)) if floor(b) > floor(a)]
    assert upward == []


def test_imports_do_not_go_in_circles():
    graph = {module: imports(module) for module in MODULES}
    assert "evals.setup.contenders" in graph["evals.rows.noise"], "the graph sees something"
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is one
    assert set(order) == set(MODULES)


def test_a_circle_and_a_step_up_would_be_seen(tmp_path, monkeypatch):
    for name, text in {
        "evals.rows.low": "def late():\n    from evals.suites import high\n",
        "evals.suites.high": "from evals.rows.low import late\n",
    }.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setitem(MODULES, name, path)
    with pytest.raises(AssertionError, match=r"'evals\.rows\.low', 'evals\.suites'"):
        test_imports_point_down()
    with pytest.raises(graphlib.CycleError):
        test_imports_do_not_go_in_circles()


def test_no_file_is_longer_than_a_reader_s_patience():
    long = {str(path): n for path in MODULES.values() if (n := path.read_text().count("\n")) > 400}
    assert not long
