"""Bytes from a config alone are those of a real cache."""

import json
import re

import pytest
import torch
import transformers

import kvplug
from kvplug.cli import main
from kvplug.compat import cache_argument
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt, random_model

SPECS = [
    "growing",
    "static",
    "static+int8(block=8)",
    "int8(block=8)",
    "int4(block=16, tail=16)",
    "int4",
    "window(length=20)",
    "sinks(sinks=2, window=18)",
    "sinks(sinks=2, window=30)+int8(block=8)",
    "host",
    "disk+int2(block=8)",
]
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: tiny_llama().config,
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=256
    ),
    "falcon": lambda: transformers.FalconConfig(**SMALL, multi_query=True),
    "falcon grouped": lambda: transformers.FalconConfig(
        **SMALL, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=16, sliding_window=24
    ),
    "mla": lambda: transformers.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", SPECS)
def test_within_a_percent_of_a_real_cache(name, spec):
    config = CONFIGS[name]()
    model = random_model(config)
    for context, batch in ((90, 1), (61, 3)):
        cache = kvplug.build(spec, config, max_cache_len=context)
        with torch.no_grad():
            model(prompt(context, batch), **cache_argument(cache))
        guess = kvplug.estimate(spec, config, context=context, batch=batch)
        assert guess == pytest.approx(cache.nbytes(), rel=0.01)
        assert guess > 0


def test_dtype_and_proportions():
    config = tiny_llama().config
    full = kvplug.estimate("growing", config, context=100, dtype=torch.float32)
    assert full == pytest.approx(2 * 2 * 2 * 16 * 100 * 4, rel=0.01)
    for half in (torch.bfloat16, "bfloat16"):
        held = kvplug.estimate("growing", config, context=100, dtype=half)
        assert held * 2 == pytest.approx(full, rel=0.01)
    with pytest.raises(kvplug.SpecError, match="unknown dtype 'bf16'"):
        kvplug.estimate("growing", config, context=100, dtype="bf16")
    assert kvplug.estimate("growing", config, context=100, batch=5) == pytest.approx(
        5 * full, rel=0.01
    )
    config.dtype = torch.float16
    assert kvplug.estimate("growing", config, context=100) * 2 == pytest.approx(full, rel=0.01)


def test_nothing_is_allocated():
    config = transformers.LlamaConfig(
        num_hidden_layers=80, num_attention_heads=64, hidden_size=8192
    )
    million = kvplug.estimate("int4+disk", config, context=1_000_000, batch=8)
    assert million > 1e12


@pytest.fixture
def folder(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_command(folder, capsys):
    assert main(["estimate", "--model", folder, "--context", "1000", "int4", "growing"]) == 0
    head, int4, growing = capsys.readouterr().out.splitlines()
    assert head.split() == ["strategy", "bytes", "MiB", "of", "exact"]
    bytes_ = int(re.search(r"[\d,]{4,}", growing).group().replace(",", ""))
    assert bytes_ == kvplug.estimate("growing", tiny_llama().config, context=1000)
    assert growing.split()[-1] == "1.00x"
    assert 0.1 < float(int4.split()[-1].rstrip("x")) < 0.4


def test_command_with_defaults(folder, capsys):
    arguments = ["estimate", "--model", folder, "--context", "100", "--dtype", "bfloat16"]
    assert main([*arguments, "--batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 10
    for name in ("growing", "kvplug:static", "int8", "sinks+int8", "disk"):
        assert any(line.startswith(name + " ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--context", "10", "imt4"], "unknown cache stage 'imt4'. Did you mean 'int4'?"),
        (["--context", "10", "--dtype", "bfloat61"], "unknown dtype 'bfloat61'"),
        (["--context", "10", "--dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
    ],
)
def test_command_errors(folder, capsys, arguments, text):
    assert main(["estimate", "--model", folder, *arguments]) == 2
    out = capsys.readouterr()
    assert text in out.err
    assert out.err.startswith("kvplug: ")


@pytest.mark.parametrize("value", ["0", "-3"])
def test_command_wants_positive_numbers(folder, capsys, value):
    with pytest.raises(SystemExit) as e:
        main(["estimate", "--model", folder, "--context", value])
    assert e.value.code == 2
    assert "is not at least 1" in capsys.readouterr().err


def test_command_without_such_a_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert main(["estimate", "--model", str(tmp_path / "absent"), "--context", "10"]) == 2
    assert capsys.readouterr().err.startswith("kvplug: ")


def test_list_command(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("sinks", "static", "int4", "disk", "auto", "kvplug:quantized"):
        assert f"  {name} " in out
