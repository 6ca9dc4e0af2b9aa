"""`auto` takes what fits, loses nothing without leave, and says why."""

import logging
import re

import pytest
import torch

import kvplug
from evals.setup import shapes
from kvplug import calibration, measured, memory
from kvplug.cli import main
from kvplug.compat import output_cache
from kvplug.errors import SpecError
from kvplug.strategy import ALLOWED
from kvplug.testing import tiny_llama
from kvplug.testing.tools import prompt
from kvplug.units import bytes_of, text_of

CPU = torch.device("cpu")
FRONT = measured.front()
# five models that are public, without weights
PUBLIC = "llama-8b", "qwen3-8b", "mistral-7b", "gemma3-4b", "smollm2-1.7b"
FOUND = {"found": [0.7, 0.55, 0.82], "exact": 0.75, "of": 2048}
KEPT = {
    "prompt": [
        {"spec": "snapkv(budget={budget})+int4", "share": 1 / 8} | FOUND,
        {"spec": "snapkv(budget={budget})+int4", "share": 1 / 16} | FOUND | {"exact": 0.83},
    ],
    "prefix": [
        {"spec": "expected(budget={budget}, heads={calibration!r})+int4", "share": 1 / 4} | FOUND,
    ],
    "stream": [
        {"spec": "expected(budget={budget})+int4", "share": 1 / 2, "kl": 0.02},
        {"spec": "expected(budget={budget})+int4", "share": 1 / 4, "kl": 0.1},
    ],
}


@pytest.fixture
def kept(monkeypatch):
    """What was measured of methods, and of two codecs, as long as a test lasts."""
    told = FRONT | {
        "kl": {codec: FRONT["kl"][codec] for codec in ("int8", "int4")},
        "kept": {use: {"options": x} for use, x in KEPT.items()},
    }
    monkeypatch.setattr(measured, "front", lambda: told)


def public(name):
    """Its config, in the dtype that it is published in."""
    config = shapes.config(name)
    config.dtype = torch.bfloat16
    return config


def best(choice):
    return choice.best and choice.best.spec


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_that_fits_four_gibibytes(name):
    """By bytes that are counted here."""
    config, picked = public(name), set()
    for context in (4096, 24_576, 49_152, 98_304, 131_072, 4_000_000):
        choice = kvplug.recommend(config, context=context, budget="4GiB", drift="medium")
        fitting = [x for x in choice.options if x.held is not None and x.held <= 4 << 30]
        assert choice.best == (fitting[0] if fitting else None)
        picked.add(best(choice))
        (exact,) = (x.held for x in choice.options if x.spec == "growing")
        if "gemma" not in name:  # whose windows hold less
            heads, layers = config.num_key_value_heads, config.num_hidden_layers
            all_of_them = 2 * 2 * heads * config.head_dim * layers * context
            assert exact == pytest.approx(all_of_them * 9 / 8, rel=0.02)  # room ahead
    assert {"growing", None} <= picked


def test_nothing_is_lost_without_leave():
    config = public("llama-8b")
    choice = kvplug.recommend(config, context=65_536, budget="4GiB")
    assert choice.best is None
    with pytest.raises(SpecError) as e:
        _ = choice.strategy
    assert re.search(
        r"auto\(budget='4GiB'\): nothing that is allowed fits 4.0 GiB: 'growing' would hold "
        r"9.0 GiB for 1 x 65,536 tokens; 'int\d' would hold \d.\d GiB at KL 0.0\d+, which "
        r"drift='none' does not allow",
        str(e.value),
    )
    for drift, limit in ALLOWED.items():
        choice = kvplug.recommend(config, context=50_000, budget="4GiB", drift=drift)
        assert choice.best is None or choice.best.loss.kl <= limit
        assert (choice.best is None) == (drift == "none")


def test_what_a_lossy_one_would_have_saved_is_said():
    reason = kvplug.recommend(tiny_llama().config, context=1000, budget="1GiB").reason
    assert re.fullmatch(
        r"growing: \d+\.\d KiB of 1.0 GiB for 1 x 1,000 tokens; nothing is lost; 'int\d' would "
        r"hold \d+\.\d KiB at KL 0\.\d+, which drift='none' does not allow",
        reason,
    )


def test_tokens_go_only_where_it_is_said_what_for(kept):
    """And allowed: of what a question asks for none, as far as can be told."""
    ask = {"context": 262_144, "budget": "4GiB"}
    model = public("llama-8b")
    for drift in ALLOWED:
        assert best(kvplug.recommend(model, **ask, drift=drift)) is None
    for use, drift in (("prompt", "low"), ("prompt", "none"), ("stream", "low")):
        choice = kvplug.recommend(model, **ask, use=use, drift=drift)
        assert choice.best is None
        assert re.search(
            r"'(snapkv|expected)\(budget=\d+\)\+int4' would hold \d+\.\d [GM]iB at .*, which "
            rf"drift='{drift}' does not allow",
            choice.reason,
        )
    assert "0.70 [0.55, 0.82] of words found, exact 0.83" in kvplug.recommend(
        model, **ask, use="prompt", drift="low"
    ).reason  # fmt: skip
    choice = kvplug.recommend(model, **ask, use="prompt", drift="medium")
    assert best(choice) == "snapkv(budget=32768)+int4"
    assert "growing, int8, int4 would not fit" in choice.reason
    assert [x.allowed for x in choice.options[-2:]] == [True, False]  # of one, words were lost
    ask["context"] //= 2
    assert best(kvplug.recommend(model, **ask, use="stream", drift="medium")) == (
        "expected(budget=65536)+int4"
    )
    short = kvplug.recommend(model, context=8192, budget="4GiB", use="prompt", drift="medium")
    assert best(short) == "growing"


def test_a_use_for_which_nothing_was_measured_says_so(monkeypatch):
    monkeypatch.setattr(measured, "front", lambda: FRONT | {"kept": {}})
    ask = {"context": 262_144, "budget": "4GiB", "drift": "medium"}
    choice = kvplug.recommend(public("llama-8b"), **ask, use="stream")
    assert choice.best is None
    assert choice.reason.endswith("; no method was measured that lets tokens go for use='stream'")


def test_a_prefix_loses_nothing_without_a_calibration(kept, tmp_path):
    """Nor by that of another model."""
    model = tiny_llama().config
    file = str(tmp_path / "tiny.safetensors")
    needs = torch.ones(model.num_hidden_layers, model.num_key_value_heads)
    calibration.write(file, {"budgets.need": needs}, model, {})
    exact = kvplug.estimate("growing", model, context=8192)
    ask = {"context": 8192, "budget": str(exact // 10), "use": "prefix", "drift": "medium"}
    choice = kvplug.recommend(model, **ask)
    assert choice.best is None
    assert choice.reason.endswith("use='prefix' without calibration=, a file of `kvplug calibrate`")
    choice = kvplug.recommend(model, **ask, calibration=file)
    assert choice.strategy == kvplug.parse(f"expected(budget=2048, heads={file!r})+int4")
    ask |= {"budget": "4GiB", "calibration": file}
    assert "whose" in kvplug.recommend(public("qwen3-8b"), **ask).options[-1].refusal


def test_generate_lets_tokens_go(kept):
    model, ids = tiny_llama(max_position_embeddings=4096), prompt(3000)
    least = kvplug.estimate("int4", model.config, context=3010)
    out = model.generate(
        ids,
        cache_implementation=f"auto(budget='{least // 2}', use='prompt', drift='medium')",
        max_new_tokens=10,
        return_dict_in_generate=True,
    )
    cache, spec = output_cache(out), "snapkv(budget=376)+int4"
    assert cache.strategy == kvplug.parse(spec)
    assert cache.nbytes() < least // 2
    # of 9 tokens after the prompt
    held = kvplug.estimate(spec, model.config, context=3009, decoded=9)
    assert cache.stats()["chosen"].startswith(f"{spec}: {text_of(held)} of ")
    assert cache.nbytes() == pytest.approx(held, rel=0.03)


def test_generate(caplog):
    model, ids = tiny_llama(), prompt(40)
    exact = model.generate(ids, max_new_tokens=5, do_sample=False)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with caplog.at_level(logging.INFO, logger="kvplug"):
        out = model.generate(ids, cache_implementation="auto", **options)
    assert torch.equal(out.sequences, exact)
    stats = output_cache(out).stats()
    assert kvplug.parse(stats["strategy"]) == kvplug.parse("growing")
    assert stats["chosen"].startswith("growing: ")
    assert caplog.messages == [f"kvplug: auto chose {stats['chosen']}"]


def test_what_is_predicted_is_what_is_held():
    """For beams, and for several sequences returned, each a row of its own."""
    model, ids = tiny_llama(max_position_embeddings=4096), prompt(3000, 2)
    ask = {"context": 3029, "batch": 4}
    budget = kvplug.estimate("growing", model.config, **ask) * 9 // 10
    for rows in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        out = model.generate(
            ids,
            cache_implementation=f"auto(budget='{budget}', drift='medium')",
            max_new_tokens=30,
            return_dict_in_generate=True,
            **rows,
        )
        cache = output_cache(out)
        assert cache.strategy == kvplug.parse("int8")
        assert "growing would not fit" in cache.stats()["chosen"]
        (predicted,) = (x.held for x in kvplug.recommend(model.config, **ask).options[1:2])
        assert cache.nbytes() == pytest.approx(predicted, rel=0.03)


def test_arguments_by_name_and_refusal_before_the_model_runs():
    model, ran = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(SpecError, match="nothing that is allowed fits 100 B"):
        model.generate(
            prompt(9),
            max_new_tokens=5,
            cache_implementation="auto",
            cache_config={"budget": "100"},
        )
    assert not ran


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("auto(budget='4 elephants')", "'4 elephants' is no size of memory"),
        ("auto(drift='some')", "drift must be one of 'none', 'low', 'medium'"),
        ("auto(use='chat')", "use must be one of 'prompt', 'prefix', 'stream'"),
        ("auto(bugdet='4GiB')", "unknown argument of 'auto': 'bugdet'. Did you mean 'budget'?"),
    ],
)
def test_bad_arguments(spec, text):
    with pytest.raises(SpecError, match=re.escape(text)):
        kvplug.parse(spec)


def test_auto_as_text():
    asked = kvplug.parse("auto(budget='2GiB', drift='low')")
    assert kvplug.parse(repr(asked)) == kvplug.parse(str(asked)) == asked
    assert kvplug.parse("int4+auto").kernel.name == "auto"  # beside a stage, the kernel


def test_held_by_hand_it_says_what_to_do():
    with pytest.raises(SpecError, match=r"kvplug.recommend\(config, context=..., batch=...\)"):
        kvplug.build("auto", tiny_llama().config)


def test_a_gpu_has_the_memory_of_the_cpu_beside(monkeypatch):
    """What is exact there comes after the codecs that are allowed on the device."""
    left = {"cuda": bytes_of("2GiB"), "cpu": bytes_of("64GiB")}
    monkeypatch.setattr(memory, "free", lambda device: left[device.type])
    config = public("llama-8b")
    ask = {"context": 65_536, "device": "cuda"}
    assert best(kvplug.recommend(config, **ask)) == "host"
    assert best(kvplug.recommend(config, **ask, budget="5GiB", drift="low")) == "int8"
    left["cpu"] = bytes_of("1GiB")
    assert kvplug.recommend(config, **ask).best is None


def test_free_memory_minds_the_container(tmp_path, monkeypatch):
    assert 1 << 20 < memory.free(CPU) < 1 << 50
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free(CPU) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(CPU) > 2_000_000
    with pytest.raises(SpecError, match=r"'mps' has left: say it, as in auto\(budget='4GiB'\)"):
        memory.free(torch.device("mps"))


def test_only_measured_codecs_are_candidates():
    kl = measured.front()["kl"]
    assert set(kl) == set(measured.front()["bits"]) <= set(kvplug.available()["codec"])
    assert all(0 < x <= ALLOWED["medium"] for x in kl.values())
    assert min(kl.values()) <= ALLOWED["low"]


def test_a_codec_that_another_beats_in_drift_and_in_bits_is_no_candidate(monkeypatch):
    made = {
        "kl": {"int4": 0.002, "int8": 0.00001, "hqq": 0.02, "int3": 0.007, "fp8": 0.001},
        "bits": {"int4": 4.7, "int8": 8.3, "hqq": 4.9, "int3": 3.7, "fp8": 8.6},
    }
    monkeypatch.setattr(measured, "front", lambda: made)
    assert [name for name, _ in measured.codecs()] == ["int8", "int4", "int3"]


def test_command(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    arguments = ["recommend", "--model", str(tmp_path), "--context", "1000"]
    assert main([*arguments, "--memory", "1GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["strategy", "holds", "loses"]
    assert re.match(r"growing +\d+\.\d KiB  KL 0.00000  chosen$", lines[1])
    assert lines[2].endswith("drift='none' does not allow it")
    assert lines[-1].startswith("growing: ")
    assert main([*arguments, "--memory", "1kB"]) == 2
    assert "nothing that is allowed fits" in capsys.readouterr().out
