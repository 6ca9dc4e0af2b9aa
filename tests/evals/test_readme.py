"""README's figures are those of the committed result folders."""

import importlib.util
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "readme_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_what_its_folder_says():
    assert README.count("<!-- figures: ") == len(figures().BLOCK.findall(README)) > 0
    assert figures().rewritten(README) == README


def test_a_table_that_was_changed_by_hand_is_noticed():
    number = re.search(r"\d+\.\d\d", README[README.index("<!-- figures: ") :])[0]
    changed = README.replace(number, "0.07")
    assert figures().rewritten(changed) == README != changed


def test_no_figure_stands_outside_of_them():
    prose = figures().BLOCK.sub("", README)
    assert not re.findall(r"\d[\d.,]* ?(?:x\b|ms\b|MiB\b|%)|KL \d\S*", prose)
