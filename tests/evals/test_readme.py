"""What README and the page on speed say is true: figures are those of the committed result folders,
names can be read, links lead somewhere.
"""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest

import kvplug
from evals.report import front
from evals.report.render import caption
from evals.report.runs import load

ROOT = Path(__file__).parents[2]


@cache
def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures():
    return script("readme_figures")


PAGES = figures().PAGES
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request):
    return request.param


@pytest.fixture
def text(page):
    return page.read_text(encoding="utf-8")


def test_every_table_is_what_its_folder_says(text):
    assert text.count("<!-- figures: ") == len(figures().BLOCK.findall(text)) > 0
    assert figures().rewritten(text) == text


def test_a_table_that_was_changed_by_hand_is_noticed(text):
    number = re.search(r"\d+\.\d\d", text[text.index("<!-- figures: ") :])[0]
    changed = text.replace(number, "0.07")
    assert figures().rewritten(changed) == text != changed


def test_no_figure_stands_outside_of_them(text):
    prose = figures().BLOCK.sub("", text)
    assert not re.findall(r"\d[\d.,]* ?(?:x\b|ms\b|MiB\b|%)|KL \d\S*", prose)


def test_the_front_is_what_its_folder_says_of_codecs_as_they_are_today():
    folder = ROOT / "docs" / "benchmarks" / "pareto"
    told = script("front").sections(folder)
    kept = json.loads((ROOT / "kvplug" / "front.json").read_text(encoding="utf-8"))
    assert told == {name: kept[name] for name in ("kl", "bits", "measured")}
    (run,) = load([folder])
    specs = {row["strategy"]: row["spec"] for row in run.rows}
    for name in told["kl"]:
        assert kvplug.parse(specs[name]) == kvplug.parse(name)
    drawn = front.draw(run.rows, caption(run.config, run.env)[0])
    assert (folder / "front.svg").read_text(encoding="utf-8") == drawn


def test_every_link_leads_somewhere(page, text):
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_strategy_that_is_shown_can_be_read():
    picks = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|", README, re.MULTILINE)
    shown = [*picks, *re.findall(r"(?:--cache |estimate\(\")([^\s\"]+)", README)]
    assert len(picks) == 5
    assert len(shown) > len(picks)
    for spec in shown:
        kvplug.parse(spec)


def test_the_table_of_names_is_that_of_the_registry():
    for kind, stages in kvplug.available().items():
        (row,) = re.findall(rf"^\| {kind}: .*", README, re.MULTILINE)
        named = re.findall(r"`(\w+)", row.split("|")[2])
        assert set(stages) <= set(named), kind
