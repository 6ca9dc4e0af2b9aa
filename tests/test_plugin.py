"""A distribution of its own adds stages by name: `examples/plugin`, built and installed for real.

What it registers is seen from other processes, since entry points are read once per process.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import fresh

ROOT = Path(__file__).parent.parent
PREAMBLE = """
import kvplug, torch, transformers
from kvplug.compat import output_cache
torch.manual_seed(0)
torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    pad_token_id=0,
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(1, 97, (2, 40))

def generate(name):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), cache_implementation=name, max_new_tokens=30,
        min_new_tokens=30, do_sample=False, return_dict_in_generate=True,
    )
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The plugin's source, and the directory it is installed in."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "installed"
    junk = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(ROOT / "examples" / "plugin", source, ignore=junk)  # a build leaves files
    # No index and no isolation: the build needs setuptools, which torch brings along.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return source, target


def test_its_names_are_listed(plugin):
    out = fresh("from kvplug.cli import main; main(['list'])", path=plugin[1:]).stdout
    assert "int8_token   Symmetric int8" in out
    assert "keynorm      Keep the `budget` tokens" in out


def test_its_stages_work_by_name(plugin):
    code = (
        PREAMBLE
        + """
assert "kvplug_example.int8_token" not in __import__("sys").modules  # imported when asked for

exact = generate("growing")
coded = generate("int8_token(block=8)")
assert output_cache(coded).strategy.codec.block == 8
assert output_cache(coded).stats()["blocks_encoded"] == 2 * (69 // 8)
assert output_cache(coded).nbytes() < 0.6 * output_cache(exact).nbytes()
assert output_cache(generate("keynorm(budget=16, every=4)")).held() < 16 + 4
assert (generate("keynorm(budget=70)").sequences == exact.sequences).all()

read = output_cache(generate("int8_shift(block=8)"))
assert set(read.stats()["kernels"]) == {"numba"} and not read.stats()["materialised"]

paged = output_cache(generate("paged(page=100)"))
assert type(paged.layers[0]).__name__ == "PagedLayer"
assert paged.layers[0].tail.capacity == 40 + 1 + 100  # the prompt, and a page from the next token

for name in ("int8_token+host", "static+int8_token(block=8)", "sinks(window=14)+int8_token"):
    cache = output_cache(generate(name))
    assert kvplug.parse(cache.stats()["strategy"]) == cache.strategy
looked = output_cache(generate("lookback(budget=24, every=8)+int8(block=8)+host"))
assert looked.held() < 32 and looked.layers[0].stats.blocks_encoded
"""
    )
    fresh(code, path=plugin[1:])


def test_it_passes_the_conformance_suites(plugin):
    source, target = plugin
    code = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))"
    assert " passed" in fresh(code, path=[target], cwd=source, env={"OMP_NUM_THREADS": "1"}).stdout


def test_a_misspelt_name_finds_the_plugins(plugin):
    code = """
import kvplug
try:
    kvplug.parse("int8_tokn")
except kvplug.SpecError as e:
    print(e)
"""
    assert "Did you mean 'int8_token'?" in fresh(code, path=plugin[1:]).stdout


def test_a_builtin_wins_a_clash_and_says_so(tmp_path):
    info = tmp_path / "clash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvplug.codecs]\nint8 = clash:Mine\n")
    code = """
import kvplug, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kvplug.parse("int8").codec.__class__.__module__.startswith("kvplug.")
    kvplug.available()
print(*[w.message for w in caught if "int8" in str(w.message)], sep="\\n")
"""
    lines = fresh(code, path=[tmp_path]).stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("codec 'int8' from 'clash:Mine' ignored")
