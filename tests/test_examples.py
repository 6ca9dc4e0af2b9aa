"""Every example runs, and prints what it promises, on a tiny random model."""

import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run examples/NAME.py --tiny as a script and return the lines it printed."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, "--tiny", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    threads, path = torch.get_num_threads(), sys.path.copy()
    yield run
    torch.set_num_threads(threads)
    sys.path[:] = path
    for shared in ("common", "tiny"):
        sys.modules.pop(shared, None)


def test_every_example_is_tested():
    tested = {n.removeprefix("test_") for n in globals() if n.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"common", "tiny"} <= tested


def test_every_example_is_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 90, path.name


def test_swap_cache(run):
    rows = {line[:32].strip(): line[32:] for line in run("swap_cache", "--new-tokens", "30")}
    for lossless in ("transformers", "growing", "host"):
        assert rows[lossless].endswith("the same text")
    held = {name: float(row.split()[0]) for name, row in rows.items()}
    assert held["int4"] < held["growing"]
    assert held["sinks(sinks=4, window=124)+int8"] < held["growing"]


def test_endless_chat(run):
    head, *rows = run("endless_chat", "--tokens", "700")  # a multiple of the window and the model
    assert "trained for 256 positions" in head
    held = [float(re.search(r"held ([\d.]+) MiB", row)[1]) for row in rows]
    assert len(rows) >= 5
    assert len(set(held)) == 1, "memory is not flat"


def test_endless_chat_grows_with_another_cache(run):
    _, *rows = run("endless_chat", "--tokens", "500", "--cache", "growing")
    held = [float(re.search(r"held ([\d.]+) MiB", row)[1]) for row in rows]
    assert held[-1] > 1.5 * held[0]


def test_long_document(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    head, growing, int4 = run("long_document", "--file", str(text), "--new-tokens", "8")
    assert "tokens of prompt" in head
    held = [float(re.search(r"held ([\d.]+) MiB", row)[1]) for row in (growing, int4)]
    assert held[1] < 0.5 * held[0]


def test_write_a_codec(run, monkeypatch):
    from kvplug.registry import REGISTRIES

    codecs = REGISTRIES["codec"]
    monkeypatch.setattr(codecs, "_targets", dict(codecs._targets))  # the name goes with the test
    _, *rows = run("write_a_codec")
    kl = {row.split()[0]: float(row.split()[-1]) for row in rows}
    assert kl["growing"] == 0
    assert 0 < kl["int8"] < kl["e4m3"] < kl["int4"] < 0.1


def test_stream_chat(run):
    lines = run("stream_chat", "--new-tokens", "8", "--cache", "int8")
    held = [line for line in lines if line.startswith("  [")]
    tokens = [int(re.match(r"  \[int8: (\d+) tokens, [\d.]+ MiB\]$", line)[1]) for line in held]
    assert len(tokens) == 2
    assert tokens[1] > tokens[0] + 8  # the second turn reads the first again
    assert len([line for line in lines if line.startswith("> ")]) == 2


# peft asks transformers for a name that is about to go
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_switch_adapters(run):
    pytest.importorskip("peft", reason="needs pip install 'kvplug[clients]'")
    rows = [(line[:8].strip(), line[9:33].strip(), line[34:]) for line in run("switch_adapters")]
    written = [(adapter, text) for adapter, cache, text in rows if cache == "transformers"]
    assert [adapter for adapter, _ in written] == ["first", "second", "first", "none"]
    assert written[0] == written[2]
    assert len({text for _, text in written}) == 3, "adapters that change nothing show nothing"
    lossless = [text for _, cache, text in rows if cache in ("growing", "host")]
    assert lossless == ["the same text"] * 8


def test_spread_weights(run):
    pytest.importorskip("accelerate", reason="comes with the extra 'evals'")
    head, *rows = run("spread_weights")
    assert head == "layers: 1 on cpu, 1 on disk"
    same = {row[:14].strip(): row[15:] for row in rows}
    for lossless in ("transformers", "growing", "host", "disk"):
        assert same[lossless] == "the same text as the whole model"


def test_harness_task(run):
    pytest.importorskip("lm_eval", reason="needs pip install 'kvplug[clients]'")
    lines = run("harness_task")
    # four questions are generated through it; the sixteen log-likelihoods are no generate calls
    assert "kvplug run: 4 generate calls: LlamaForCausalLM named a strategy itself (4)" in lines
    rows = [re.split(r" *\| *", line)[1] for line in lines if line.startswith("|")]
    assert rows[-2:] == ["choose", "say"]


def test_serve_openai(run):
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason="needs pip install 'kvplug[clients]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = run("serve_openai", "--port", str(port), "--cache", "host")
    answers = {line[:20].strip(): line[21:] for line in lines if not line.startswith("kvplug run")}
    assert "400 unknown cache stage 'imt4'. Did you mean 'int4'?" in answers["imt4"]
    for name in ("no cache named", "window(length=64)", "kvplug:static"):
        assert not re.match(r".\d{3} ", answers[name])  # an answer, no status
    assert lines[-1] == (
        "kvplug run: 3 generate calls: LlamaForCausalLM took host (1); "
        "LlamaForCausalLM named a strategy itself (2)"
    )


def test_ask_document(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    asked = ("--file", str(text), "--store", (tmp_path / "store").as_uri())
    first, *_ = run("ask_document", "Who?", *asked)
    again, *_ = run("ask_document", "Why is that so?", *asked)
    assert first.startswith("0 of 9")
    assert again.startswith("772 of 9")  # three chunks of 256 after the first 4


def test_kept_chat(run, tmp_path):
    found = []
    for message in ("Hello! " * 12, "And then?"):
        head, *_ = run("kept_chat", message, "--folder", str(tmp_path))
        found.append(int(head.split()[0]))
    assert found[0] == 0
    assert found[1] >= 64
