"""Bytes from a config alone are those of a real cache."""

import json
import re
from functools import cache

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import kvplug
from kvplug import cost
from kvplug.cli import main
from kvplug.codecs import formats, integers
from kvplug.compat import cache_argument
from kvplug.testing import specs, tiny_llama
from kvplug.testing.matrix import CHOOSING
from kvplug.testing.tools import prompt, random_model

SPECS = [
    "growing",
    "kvplug:static",
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


@cache
def model_of(name):
    return random_model(CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", SPECS)
def test_within_a_percent_of_a_real_cache(name, spec):
    model = model_of(name)
    config = model.config
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


def test_nothing_is_allocated_or_computed(monkeypatch):
    """Not for a method that asks for queries either: attention of theirs would see all blocks."""
    for module, name in ((integers, "round_keys"), (formats, "unpack")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("no data is there"))
    config = transformers.LlamaConfig(
        num_hidden_layers=80, num_attention_heads=64, hidden_size=8192
    )
    million = kvplug.estimate("int4+disk", config, context=1_000_000, batch=8)
    assert million > 1e12
    kept = kvplug.estimate(
        "snapkv(budget=500_000)+int4", config, context=1_000_000, batch=8, decoded=65
    )
    assert million / 2 < kept < million * 0.6  # room in memory grows by an eighth


def test_a_compiled_kernel_reads_nothing_either():
    pytest.importorskip("numba", reason="the kernel is compiled by numba")
    told = {"config": tiny_llama().config, "context": 96, "decoded": 9}
    sizes = [kvplug.estimate(f"snapkv(budget=40)+int4(block=8){x}", **told) for x in ("", "+numba")]
    assert sizes[0] == sizes[1] > 0


HYBRIDS = {
    "qwen3 next": lambda: transformers.Qwen3NextConfig(num_hidden_layers=8),
    "jamba": lambda: transformers.JambaConfig(),
    "minimax": lambda: transformers.MiniMaxConfig(num_hidden_layers=4),
    "nemotron": lambda: transformers.NemotronHConfig(),
    "recurrent gemma": lambda: transformers.RecurrentGemmaConfig(num_hidden_layers=6),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_hold_what_their_attention_layers_hold(name):
    config = HYBRIDS[name]()
    layers = [type(x).__name__ for x in transformers.DynamicCache(config=config).layers]
    full = layers.count("DynamicLayer")
    sliding = layers.count("DynamicSlidingWindowLayer")
    assert 0 < full + sliding <= len(layers)  # RecurrentGemma's were all windows once
    H = config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = kvplug.estimate("growing", config, context=64, dtype="float32")
    assert held == pytest.approx((full + sliding) * 2 * H * D * 64 * 4, rel=0.01)


def test_every_config_is_estimated_or_refused():
    """Whatever the installed transformers can generate with, built by default."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    sizes, refused = {}, {}
    for name in names:
        try:
            config = transformers.CONFIG_MAPPING[name]()
        except StrictDataclassError:  # wants an argument
            continue
        for spec in ("growing", "kvplug:static"):
            try:
                sizes[name, spec] = kvplug.estimate(spec, config, context=64)
            except kvplug.KvplugError as e:
                refused[name, spec] = str(e)
    assert len(sizes) > 200
    assert all(sizes.values())
    assert all(refused.values())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("static", "kvplug:static"), ("quantized", "kvplug:quantized"), ("dynamic", "growing")],
)
def test_names_of_transformers_are_its_own_as_in_generate(name, nearest):
    with pytest.raises(kvplug.SpecError, match=f"transformers' own, .* is '{nearest}'"):
        kvplug.estimate(name, tiny_llama().config, context=10)
    assert kvplug.estimate(nearest, tiny_llama().config, context=10)
    strategy = kvplug.parse("static(max_cache_len=10)")
    assert kvplug.estimate(strategy, tiny_llama().config, context=10), "an object is ours"


@pytest.mark.parametrize("context", [10**13, 10**30])
def test_more_tokens_than_can_be_counted(context):
    with pytest.raises(kvplug.SpecError, match="at most"):
        kvplug.estimate("growing", tiny_llama().config, context=context)
    assert kvplug.estimate("growing", transformers.LlamaConfig(), context=1 << 40) > 1 << 50


@pytest.fixture
def folder(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_command(folder, capsys):
    assert main(["estimate", "--model", folder, "--context", "1000", "int4", "growing"]) == 0
    head, int4, growing, source = capsys.readouterr().out.splitlines()
    assert head.split() == ["strategy", "bytes", "MiB", "of", "exact", "drift"]
    bytes_ = int(re.search(r"[\d,]{4,}", growing).group().replace(",", ""))
    assert bytes_ == kvplug.estimate("growing", tiny_llama().config, context=1000)
    assert growing.endswith(" 1.00x  loses nothing")
    held, drift = re.search(r"([\d.]+)x  (.*)$", int4).groups()
    assert 0.1 < float(held) < 0.4
    assert drift == cost.cost(kvplug.parse("int4"))
    assert source == cost.source()


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


def test_command_gives_the_reason_in_the_row(tmp_path, capsys):
    """And goes on; only where every row is refused, that is an error."""
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=32)
    config.save_pretrained(tmp_path)
    arguments = ["estimate", "--model", str(tmp_path), "--context", "100"]
    refused = ["kvplug:static+int8", "static"]
    assert main([*arguments, *refused, "int8"]) == 0
    _, coded, static, int8, _ = capsys.readouterr().out.splitlines()
    assert re.match(r"kvplug:static\+int8 +refused: .*has no attention layer it could serve", coded)
    assert re.match(r"static +refused: .*the nearest is 'kvplug:static'", static)
    assert "x  " in int8
    assert main([*arguments, *refused]) == 2


def test_command_with_a_word_for_a_number(folder, capsys):
    with pytest.raises(SystemExit) as e:
        main(["estimate", "--model", folder, "--context", "abc"])
    assert e.value.code == 2
    assert "argument --context: 'abc' is not a whole number" in capsys.readouterr().err


def test_command_with_a_huge_number(folder, capsys):
    assert main(["estimate", "--model", folder, "--context", "9" * 30]) == 2
    assert "bytes are counted for at most" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"kvplug {kvplug.__version__}\n"


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
    readers = dict(re.findall(r"^  (\w+) .*\[(.*)\]$", out, re.MULTILINE))
    assert readers["int4"].split(", ") == ["numba", "reference", "triton"]
    assert readers["fp8"] == readers["hqq"] == "reference"
    assert re.search(rf"^  int4 .*\. {re.escape(cost.cost(kvplug.parse('int4')))}\. \[", out, re.M)
    assert re.search(r"^  kvplug:offloaded +host +loses nothing$", out, re.MULTILINE)
    assert out.endswith(cost.source() + "\n")


def test_what_was_measured_is_said_of_nothing_else():
    bits, kl = cost.front()["bits"], cost.front()["kl"]
    assert bits.keys() == kl.keys()
    assert len(bits) >= 2
    for name in bits:
        figures = f"{bits[name]:.2f} bits, KL {kl[name]:.5f}"
        assert {cost.cost(kvplug.parse(x)) for x in (name, f"{name}+host")} == {figures}
    for spec in ("growing", "static", "disk", "exact(block=8)+host"):
        assert cost.cost(kvplug.parse(spec)) == "loses nothing"
    for spec in ("int4(tail=0)", "int(k_bits=5)", "int4+int8@0", "sinks+int8", "window", "snapkv"):
        assert cost.cost(kvplug.parse(spec)) == "not measured"


@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("rest", ["", "+int4(block=8, tail=0)", "+exact(block=8)+host"])
def test_what_a_method_leaves_of_a_prompt(method, rest):
    model, spec = tiny_llama(), specs.SMALL[method] + rest
    cache = kvplug.build(spec, model.config)
    with torch.no_grad():
        model(prompt(100), **cache_argument(cache))
    estimated = kvplug.estimate(spec, model.config, context=100)
    assert estimated == pytest.approx(cache.nbytes(), rel=0.03)  # h2o remembers a number a token
    whole = kvplug.estimate("growing" + rest, model.config, context=400)
    assert kvplug.estimate(spec, model.config, context=400, decoded=300) < whole / 3
