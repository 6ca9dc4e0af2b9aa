"""`kvplug run`: the mark it leaves, who takes it, who is left alone, and that all of it is said."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import fresh
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    MambaConfig,
)

import kvplug
from kvplug import compat, launch
from kvplug.cli import main
from kvplug.testing.tools import prompt, random_model, tiny_llama

ROOT = Path(__file__).parent.parent
SCRIPT = """
import subprocess, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
))
out = model.generate(torch.ones(1, 30, dtype=torch.long), max_new_tokens=8)
model.generate(out, max_new_tokens=1, cache_implementation="static")
print(sys.argv[1:], file=sys.stdout)
sys.exit(7)
"""


@pytest.fixture
def default():
    """`launch.default`, undone after the test."""
    names = (compat.PREPARE_CONFIG, compat.PREPARE_CACHE)
    hooked = [getattr(GenerationMixin, name) for name in names]
    yield launch.default
    for name, method in zip(names, hooked, strict=True):
        setattr(GenerationMixin, name, method)


def generate(model, ids=None, **kwargs):
    """What `generate` returns, its cache last."""
    ids = prompt(40) if ids is None else ids
    out = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **kwargs)
    return out.sequences, compat.output_cache(out)


def test_a_call_that_names_no_cache_takes_the_strategy(default, capsys):
    model = tiny_llama()
    named, _ = generate(model, cache_implementation="window(length=8)")
    exact, _ = generate(model)
    calls = default("window(length=8)")
    config = GenerationConfig(max_new_tokens=6, return_dict_in_generate=True)
    tokens, cache = generate(model)
    assert str(cache.strategy) == "window(length=8)"
    assert torch.equal(tokens, named)
    assert not torch.equal(tokens, exact), "the model is too flat for this test"
    model.generate(prompt(40), generation_config=config)
    assert config.cache_implementation is None, "the caller's object was changed"
    assert calls == {"LlamaForCausalLM took window(length=8)": 2}
    assert capsys.readouterr().err == "kvplug run: LlamaForCausalLM took window(length=8)\n"


def test_a_call_with_a_cache_of_its_own_keeps_it(default, capsys):
    model = tiny_llama()
    calls = default("int4")
    assert type(generate(model, cache_implementation="static")[1]).__name__ == "StaticCache"
    assert str(generate(model, cache_implementation="int8")[1].strategy) == "int8"
    mine = DynamicCache()
    tokens, cache = generate(model, **compat.cache_argument(mine))
    assert cache is mine
    ours = kvplug.build("growing", model.config)
    generate(model, tokens, **compat.cache_argument(ours))
    model.generate(prompt(4), max_new_tokens=2, use_cache=False)
    generate(model, assistant_model=tiny_llama(num_hidden_layers=1))
    assert calls.pop("LlamaForCausalLM took int4") == 1  # the assisted one
    what = [
        "was left alone: it names 'static'",
        "named a strategy itself",
        "was left alone: it was given a DynamicCache",
        "was left alone: it was given a Cache",
        "was left alone: it was told use_cache=False",
        "was left alone: it assists another model",
    ]
    assert list(calls) == [f"LlamaForCausalLM {x}" for x in what]
    said = capsys.readouterr().err
    for line in calls:
        assert said.count(f"kvplug run: {line}\n") == 1


def test_what_the_strategy_cannot_serve_is_left_to_transformers_and_said(default, capsys):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    mamba = random_model(MambaConfig(**sizes))
    expected = mamba.generate(prompt(5), max_new_tokens=3)
    calls = default("int4")
    assert torch.equal(mamba.generate(prompt(5), max_new_tokens=3), expected)
    ((what, n),) = calls.items()
    assert re.match(r"MambaForCausalLM was left alone: int4: .* no attention layer", what)
    assert n == 1
    launch.report(calls)
    first, last = [line for line in capsys.readouterr().err.splitlines() if "kvplug" in line]
    assert first == f"kvplug run: {what}"
    assert last == f"kvplug run: 1 generate call: {what} (1)"


def test_a_model_that_prepares_its_cache_by_code_of_its_own_is_counted(default):
    class Own(LlamaForCausalLM):
        def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
            model_kwargs[compat.CACHE_ARGUMENT] = DynamicCache()

    model = tiny_llama()
    model.__class__ = Own
    calls = default("int4")
    assert isinstance(generate(model)[1], DynamicCache)
    assert calls == {"Own was left alone: it never asked for a cache": 1}


def test_a_transformers_that_lacks_what_is_needed_is_said(monkeypatch, capsys):
    hooked = getattr(GenerationMixin, compat.PREPARE_CACHE)
    monkeypatch.setenv("KVPLUG_RUN", "int4")
    monkeypatch.setattr(compat, "problems", lambda: ["GenerationMixin.this", "that"])
    launch.start()
    assert getattr(GenerationMixin, compat.PREPARE_CACHE) is hooked
    assert re.search(
        r"kvplug run: transformers [\d.]+ is not .* no GenerationMixin.this, no that\. .*: "
        r"generate calls of .* are left to transformers\n",
        capsys.readouterr().err,
    )


@pytest.fixture
def started(monkeypatch):
    """What `run` would have become: (file, argv, env), without becoming it."""
    found = []
    monkeypatch.setattr(os, "execvpe", lambda *given: found.append(given))
    restored = signal.getsignal(signal.SIGPIPE)
    yield found
    signal.signal(signal.SIGPIPE, restored)


@pytest.mark.parametrize(
    ("before", "after"), [(None, ""), ("/a:/b", ":/a:/b"), ("/a:", ":/a:")], ids=str
)
def test_the_environment_of_the_command(started, monkeypatch, capsys, before, after):
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    monkeypatch.setenv("PATH", "/somewhere")
    main(["run", "--cache", "sinks(sinks=4;window=8)", "--", "lm_eval", "--tasks", "a b"])
    ((file, argv, env),) = started
    assert (file, argv) == ("lm_eval", ["lm_eval", "--tasks", "a b"])
    assert env["PYTHONPATH"] == f"{launch.STARTUP}{after}"
    assert env["PATH"] == f"{Path(sys.executable).parent}:/somewhere"
    assert "KVPLUG_RUN" not in os.environ
    said = capsys.readouterr().err
    assert said.startswith("kvplug run: sinks(sinks=4;window=8) for each generate call of `lm_eval")
    assert said.count("\n") == 1


def test_without_a_strategy_the_names_are_known_and_calls_are_counted(started, default, capsys):
    main(["run", "--", "lm_eval"])
    ((_, _, env),) = started
    assert env["KVPLUG_RUN"] == ""
    assert capsys.readouterr().err.startswith(
        "kvplug run: the names of kvplug are known to the generate calls of `lm_eval`"
    )
    model = tiny_llama()
    calls = default(None)
    assert isinstance(generate(model)[1], DynamicCache)
    assert str(generate(model, cache_implementation="int8")[1].strategy) == "int8"
    assert calls == {
        "LlamaForCausalLM was left alone: it names no cache": 1,
        "LlamaForCausalLM named a strategy itself": 1,
    }


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("imt4", "kvplug: unknown cache stage 'imt4'. Did you mean 'int4'?"),
        ("int4(group=0)", "group must be at least 1"),
        ("static", "'static' is a name of transformers, which `run` does not set"),
    ],
)
def test_a_wrong_strategy_starts_nothing(started, capsys, spec, text):
    assert main(["run", "--cache", spec, "--", "python"]) == 2
    assert text in capsys.readouterr().err
    assert not started


def test_a_command_that_is_not_there(capsys):
    restored = signal.getsignal(signal.SIGPIPE)
    assert main(["run", "--cache", "int4", "--", "no-such-command"]) == 127
    signal.signal(signal.SIGPIPE, restored)
    assert "kvplug: cannot start 'no-such-command': " in capsys.readouterr().err


def below(code, *path, cwd):
    """Standard output and error of a Python process as `kvplug run` would have started it."""
    path = os.pathsep.join(map(str, (launch.STARTUP, *path)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "KVPLUG_RUN": "int4"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_a_process_without_generate_pays_nothing_and_keeps_its_own_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.mine = __file__\n")
    code = "import sys; print(sys.mine, sys.modules['sitecustomize'].__file__, sys.path)"
    code += "; print([name for name in ('torch', 'transformers', 'kvplug') if name in sys.modules])"
    out, err = below(code, tmp_path, cwd=tmp_path)
    mine = str(tmp_path / "sitecustomize.py")
    assert out.startswith(f"{mine} {mine} ")
    assert str(launch.STARTUP) not in out
    assert out.endswith("\n[]\n")
    assert not err


def test_a_python_without_kvplug_says_so(tmp_path):
    package = tmp_path / "transformers/generation"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "utils.py").write_text("generate = 3\n")
    (tmp_path / "kvplug.py").write_text("import no_such_module\n")
    code = "from transformers.generation.utils import generate; print(generate)"
    out, err = below(code, tmp_path, cwd=tmp_path)
    assert out == "3\n"
    assert err == (
        f"kvplug run: {sys.executable} has no kvplug that works (ModuleNotFoundError: No "
        "module named 'no_such_module'): its generate calls are left to transformers\n"
    )


def kvplug_run(*arguments, cwd, expected):
    """A real `kvplug run`, from another folder."""
    code = f"import sys; from kvplug.cli import main; sys.exit(main(['run', *{arguments!r}]))"
    return fresh(code, cwd=cwd, path=[ROOT], expected=expected)


def test_a_script_that_never_heard_of_kvplug(tmp_path):
    (tmp_path / "their_script.py").write_text(SCRIPT)
    command = ("python", "their_script.py", "--flag", "x")
    done = kvplug_run("--cache", "host", "--", *command, cwd=tmp_path, expected=7)
    assert done.stdout == "['--flag', 'x']\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("kvplug run: ")]
    assert said[1:] == [
        "kvplug run: LlamaForCausalLM took host",
        "kvplug run: LlamaForCausalLM was left alone: it names 'static'",
        "kvplug run: 2 generate calls: LlamaForCausalLM took host (1); "
        "LlamaForCausalLM was left alone: it names 'static' (1)",
    ]


def test_a_process_below_the_command_takes_it_and_signals_pass_through(tmp_path):
    (tmp_path / "their_script.py").write_text(SCRIPT)
    command = ("sh", "-c", "python -m their_script --flag; kill -TERM $$")
    done = kvplug_run("--cache", "host", "--", *command, cwd=tmp_path, expected=-signal.SIGTERM)
    assert done.stdout == "['--flag']\n"
    assert re.search(r"^kvplug run \[\d+\]: LlamaForCausalLM took host$", done.stderr, re.M)
    assert re.search(r"^kvplug run \[\d+\]: 2 generate calls: Llama", done.stderr, re.M)
