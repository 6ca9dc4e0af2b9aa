import pytest

from evals.__main__ import main
from evals.setup.contenders import EXACT, Contender, Rival, resolve


def test_the_exact_cache_comes_first_and_nothing_twice():
    rows = resolve(["int8", "static", "dynamic", "int8", "transformers:static"])
    assert rows == [
        Rival(EXACT, "evals.rivals.transformers_dynamic"),
        Contender("int8"),
        Contender("kvplug:static"),
        Rival("transformers:static", "evals.rivals.transformers_static"),
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
    monkeypatch.setattr("evals.setup.model.load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("evals.setup.data.load", lambda *_: pytest.fail("the data was loaded"))
    assert main(["run", "--strategies", f"int8,{name}"]) == 2
    assert said in capsys.readouterr().err
