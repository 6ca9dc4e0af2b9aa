"""Every built-in placement keeps the contract; what `disk` and `host` promise besides."""

import copy
import errno
import gc
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from forked import forked

import kvplug
from kvplug.compat import cache_argument
from kvplug.placement import disk, host
from kvplug.testing import PlacementConformance, tiny_llama
from kvplug.testing.specs import BUILTIN
from kvplug.testing.tools import prompt


class TestPlacement(PlacementConformance):
    @pytest.fixture(params=BUILTIN["placement"])
    def placement(self, request):
        return kvplug.parse(request.param).placement


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mapped(folder):
    """Address ranges of this process that are files of a folder, and share what is written."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has mapped")
    lines = [line.split() for line in maps.read_text().splitlines() if str(folder) in line]
    return [tuple(int(end, 16) for end in a.split("-")) for a, mode, *_ in lines if mode[-1] == "s"]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_disk_leaves_nothing_behind(folder):
    model = tiny_llama()
    cache = kvplug.build("disk+int4(block=8, tail=8)", model.config)
    model.generate(prompt(40), **cache_argument(cache), max_new_tokens=4, do_sample=False)
    assert list(folder.iterdir()) == [], "files have no name"
    n = len(mapped(folder))
    assert n == 10, "five tensors of each layer"
    twin = copy.deepcopy(cache)
    assert len(mapped(folder)) == 2 * n
    del cache
    gc.collect()
    assert len(mapped(folder)) == n
    assert twin.layers[0].keys.isfinite().all()
    del twin
    gc.collect()
    assert mapped(folder) == []


def test_disk_is_given_back_after_an_exception(folder):
    model = tiny_llama()

    def fail(*_):
        assert mapped(folder)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        model.generate(
            prompt(90), max_new_tokens=4, cache_implementation="disk", stopping_criteria=[fail]
        )
    gc.collect()
    assert mapped(folder) == []


def test_disk_folder_of_ones_own(tmp_path):
    spec = f"disk(folder={str(tmp_path)!r})+int8(block=8)"
    cache = kvplug.build(spec, tiny_llama().config)
    cache.layers[0].update(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16))
    assert mapped(tmp_path)
    with pytest.raises(kvplug.SpecError, match="no such directory"):
        kvplug.parse(f"disk(folder={str(tmp_path / 'absent')!r})")


def test_disk_folder_that_is_not_to_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write all
    with pytest.raises(kvplug.SpecError, match="may not write there"):
        kvplug.parse(f"disk(folder={str(tmp_path)!r})")


def test_disk_blocks_are_mapped_files(folder):
    """The bytes of blocks lie in a file, whose descriptor is closed, not on the heap."""
    before = descriptors()
    cache = kvplug.build("disk+int8(block=8)", tiny_llama().config)
    cache.layers[0].update(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16))
    for x in cache.layers[0].blocks.tensors.values():
        assert x.is_shared()
        assert any(low <= x.data_ptr() < high for low, high in mapped(folder))
    assert descriptors() == before


@pytest.mark.parametrize("lacks", ["names of descriptors", "posix_fallocate", "support of it"])
def test_disk_where_the_system_lacks_something(folder, monkeypatch, lacks):
    if lacks == "names of descriptors":
        monkeypatch.setattr(disk, "DESCRIPTORS", ())
    elif lacks == "posix_fallocate":
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    else:

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr("os.posix_fallocate", refuse, raising=False)
    place = kvplug.parse("disk").placement.open()
    shape = (3, 1 << 10, 257)  # more than is written at once, and not a multiple of it
    room = place.empty(shape, torch.float32, torch.device("cpu"))
    room.copy_(x := torch.randn(shape))
    assert torch.equal(room, x)
    assert list(folder.iterdir()) == []
    assert mapped(folder)
    del room
    gc.collect()
    assert mapped(folder) == []


@pytest.fixture
def small(tmp_path):
    """A file system of 256 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def without_room(folder):
    """`generate` for more than fits; then the next call, as if there had been none."""
    model, ids = tiny_llama(), prompt(3000)
    spec = f"disk(folder={str(folder)!r})+exact(block=8)"
    with pytest.raises(OSError, match="free some, or name another folder") as e:
        model.generate(ids, max_new_tokens=4, cache_implementation=spec)
    assert isinstance(e.value, kvplug.NoRoom)
    assert e.value.filename == str(folder)
    number = e.value.errno
    del e  # its traceback holds the cache
    gc.collect()
    assert mapped(folder) == []
    settings = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(ids[:, :90], cache_implementation=spec, **settings)
    assert torch.equal(got, model.generate(ids[:, :90], **settings))
    return number


def test_disk_on_a_full_file_system(small):
    """In a child: a write to a page that found no room would end the process."""
    assert forked(lambda: without_room(small)) == (0, str(errno.ENOSPC))


def test_disk_under_a_limit_of_file_size(tmp_path):
    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        return without_room(tmp_path)

    assert forked(limited) == (0, str(errno.EFBIG))


def test_disk_leaves_nothing_of_a_killed_process(tmp_path):
    def killed():
        spec = f"disk(folder={str(tmp_path)!r})+int8(block=8)"
        cache = kvplug.build(spec, tiny_llama().config)
        cache.layers[0].update(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16))
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == (-signal.SIGKILL, "")
    assert list(tmp_path.iterdir()) == []


def test_host_says_once_that_it_saves_nothing_on_a_cpu(caplog):
    host._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kvplug"):
        for _ in range(3):
            cache = kvplug.build("host", tiny_llama().config)
            cache.layers[0].update(torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16))
    assert caplog.text.count("saves nothing here") == 1


def test_tail_stays_on_the_device_and_blocks_do_not():
    cache = kvplug.build("disk+exact(block=8, tail=8)", tiny_llama().config)
    cache.layers[0].update(torch.randn(1, 2, 41, 16), torch.randn(1, 2, 41, 16))
    layer = cache.layers[0]
    assert len(layer.blocks) == 4
    assert len(layer.tail) == 9
    assert not any(x.is_shared() for x in layer.tail.tensors.values())
