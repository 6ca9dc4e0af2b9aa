import re

import pytest

from evals import suites
from evals.__main__ import main
from evals.arguments import gather, split_specs
from evals.run import run
from evals.setup.config import Config, ConfigError


def test_commas_inside_parentheses_do_not_split():
    spec = "window(length=64)"
    assert split_specs(f"int4, {spec} ,sinks(sinks=4, window=60)+int8,") == [
        "int4",
        spec,
        "sinks(sinks=4, window=60)+int8",
    ]


def test_list_names_rows_and_metrics(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "transformers:quantized" in shown
    assert "top1" in shown
    for name in suites.names():
        assert f"--suite {name}" in shown


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
        return tmp_path / "run.toml"

    return write


def test_the_command_line_wins_over_the_file_and_the_file_over_the_suite(toml):
    file = toml('suite = "decode"\ncontext = [64, 128]\nbatch = 2\nstrategies = "int8,int4"\n')
    config = gather(file, {"context": [32]})
    assert config.context == (32,)
    assert config.batch == (2,)
    assert config.strategies == ("int8", "int4")
    assert config.decode_steps == suites.get("decode").DEFAULTS["decode_steps"]
    assert config.window == Config.window
    assert gather(None, {}) == Config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("contxt = 64", "unknown key 'contxt'. Did you mean 'context'?"),
        ('context = "64"', "context='64': accepted is a whole number or a list"),
        ("context = [64, 1.5]", "context=1.5: accepted is a whole number or a list"),
        ("threads = true", "threads=True: accepted is a whole number"),
        ("model = 3", "model=3: accepted is text"),
        ("batch = 0", "batch=0: accepted are whole numbers from 1"),
        ('strategies = ["imt8"]', "Did you mean 'int8'?"),
        ('suite = "drfit"', "Did you mean 'drift'?"),
        ("context = [64", "cannot read"),
    ],
)
def test_validate_says_what_is_wrong_with_a_file(text, said, toml, capsys):
    assert main(["validate", str(toml(text))]) == 2
    assert said in capsys.readouterr().err


def test_validate_shows_what_a_config_comes_out_as(toml, capsys):
    file = toml('suite = "kernel"\n')
    assert main(["validate", str(file), "--context", "64,128", "256", "--seed", "7"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "suite kernel" in shown
    assert "context (64, 128, 256)" in shown
    assert "seed 7" in shown
    assert "int8, int4, int2" in shown


def test_flags_that_are_no_numbers_are_refused(capsys):
    assert main(["validate", "--context", "many"]) == 2
    assert "context=many: accepted are whole numbers" in capsys.readouterr().err
    assert main(["validate", "nowhere.toml"]) == 2
    assert "cannot read nowhere.toml" in capsys.readouterr().err


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; a config is a TOML file"):
        gather(tmp_path, {})
    (tmp_path / "env.json").touch()
    with pytest.raises(ConfigError, match="is a result folder, which `report` renders"):
        gather(tmp_path, {})


def test_an_unknown_suite_is_refused_by_whoever_asks_for_it(tmp_path, console):
    said = "unknown suite 'decod'. Did you mean 'decode'? Known: bias, choosing, decode, drift,"
    for ask in (
        lambda: gather(None, {"suite": "decod"}),
        lambda: suites.get("decod"),
        lambda: run(Config(suite="decod"), tmp_path, console),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            ask()
