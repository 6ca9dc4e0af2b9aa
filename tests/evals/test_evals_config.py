import pytest

from evals.__main__ import main
from evals.config import Config, ConfigError, split_specs
from evals.strategies import EXACT, Rival, Strategy, resolve


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("windows", 0, "windows=0: accepted are whole numbers from 1"),
        ("context", 1, "context=1: accepted are whole numbers from 2"),
        ("skip", 2047, "skip=2047: accepted are 0 to 2046, two less than window"),
        ("threads", 0, "threads=0: accepted are whole numbers from 1"),
        ("dtype", "bfloat61", "unknown dtype 'bfloat61'. Did you mean 'bfloat16'? Known: float32,"),
        ("strategies", (), "strategies is empty"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_accepted(field, value, said):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert said in str(caught.value)


def test_commas_inside_parentheses_do_not_split():
    spec = "window(length=64)"
    assert split_specs(f"int4, {spec} ,sinks(sinks=4, window=60)+int8,") == [
        "int4",
        spec,
        "sinks(sinks=4, window=60)+int8",
    ]


def test_the_key_depends_on_every_field():
    assert Config().key == Config().key
    assert len({Config().key, Config(windows=3).key, Config(strategies=("int4",)).key}) == 3


def test_the_exact_cache_comes_first_and_nothing_twice():
    rows = resolve(["int8", "static", "dynamic", "int8", "transformers:static"])
    assert rows == [
        Rival(EXACT),
        Strategy("int8"),
        Strategy("kvplug:static"),
        Rival("transformers:static"),
    ]
    assert "int8" in rows[1].spec
    assert len(rows[1].spec) > len("int8"), "the defaults are written out"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("imt8", "Did you mean 'int8'?"),
        ("int4+int8", "two stages"),
        ("transformers:statik", "Did you mean 'transformers:static'?"),
    ],
)
def test_an_unknown_strategy_ends_the_run_before_the_model_is_loaded(
    name, said, monkeypatch, capsys
):
    monkeypatch.setattr("evals.model.load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("evals.data.load", lambda *_: pytest.fail("the data was loaded"))
    assert main(["run", "--strategies", f"int8,{name}"]) == 2
    assert said in capsys.readouterr().err


def test_list_names_rows_and_metrics(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "transformers:quantized" in shown
    assert "top1" in shown
