"""What `auto` knows of losses is what the committed result folders say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("retrieval", "unseen", "stream", "stream-heads")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("front", ROOT / "scripts" / "front.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_methods_lose_is_what_their_folders_say(script):
    told = json.loads(script.FRONT.read_text(encoding="utf-8"))["kept"]
    found = script.together([ROOT / "docs" / "benchmarks" / folder for folder in FOLDERS])["kept"]
    assert {use: told[use] for use in found} == found
    assert set(found) == {"prompt", "prefix", "stream"}


def row(strategy, value, metric="retrieval_asked", case=None, suite="retrieval"):
    names = ("model", "dataset", "note", "transformers", "torch", "hardware")
    return dict.fromkeys(names) | {
        "suite": suite, "metric": metric, "strategy": strategy, "context": 2048,
        "value": value, "n": 10, "case": case or {"depth": 0.5},
    }  # fmt: skip


def test_names_and_numbers_become_those_of_the_call(script):
    """Only of the method that serves the use; shares by falling size, without a codec first."""
    rows = [
        row("transformers:dynamic", 0.7),
        row("snapkv(budget=256)+int4", 0.2),
        row("snapkv(budget=512, window=16)+int4", 0.6),
        row("snapkv(budget=512, window=16)+int4", 0.8, case={"depth": 1}),
        row("snapkv(budget=512)", 0.7),
        row("expected(budget=512)+int4", 0.1),
        row("snapkv(budget=512)", 0.9, metric="retrieval"),
    ]
    options = script.of_methods(rows, *script.METHODS["prompt"])["options"]
    assert [(x["spec"], x["share"], x["found"][0]) for x in options] == [
        ("snapkv(budget={budget})", 0.25, 0.7),
        ("snapkv(budget={budget}, window=16)+int4", 0.25, 0.7),
        ("snapkv(budget={budget})+int4", 0.125, 0.2),
    ]
    assert options[0]["exact"] == 0.7
    assert script.of_methods(rows, *script.METHODS["stream"]) is None


def test_budgets_of_heads_are_those_of_the_call_and_no_others_serve(script):
    names = "expected(budget=512)", "expected(budget=512, heads='m.safetensors')+int4"
    rows = [row(x, 0.7, "retrieval", suite="unseen") for x in ("transformers:dynamic", *names)]
    (option,) = script.of_methods(rows, *script.METHODS["prefix"])["options"]
    assert option["spec"] == "expected(budget={budget}, heads={calibration!r})+int4"


def test_of_a_text_that_goes_on_heads_with_budgets_come_first(script, monkeypatch):
    """Each of its folders has measured something."""
    heads = "expected(budget=1024, heads='m.safetensors')"
    folders = {
        "a": ("transformers:dynamic", "expected(budget=512)", "expected(budget=1024)"),
        "b": ("transformers:dynamic", f"{heads}+int4", heads),
    }

    def read(folder):
        return None, None, [row(x, 0.1, "kl", "1024-2048", "stream") for x in folders[str(folder)]]

    monkeypatch.setattr(script, "read", read)
    options = script.together(map(Path, "ab"))["kept"]["stream"]["options"]
    assert [(x["spec"], x["share"]) for x in options] == [
        ("expected(budget={budget}, heads={calibration!r})", 0.5),
        ("expected(budget={budget})", 0.5),
        ("expected(budget={budget}, heads={calibration!r})+int4", 0.5),
        ("expected(budget={budget})", 0.25),
    ]
