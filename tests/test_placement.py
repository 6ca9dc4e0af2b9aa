"""Every built-in placement keeps the contract; what `disk` and `host` promise besides."""

import copy
import gc
import logging
import tempfile
from pathlib import Path

import pytest
import torch

import kvplug
from kvplug.compat import cache_argument
from kvplug.placement import host
from kvplug.testing import PlacementConformance, tiny_llama
from kvplug.testing.tools import prompt


class TestPlacement(PlacementConformance):
    @pytest.fixture(params=["device", "host", "disk"])
    def placement(self, request):
        return kvplug.parse(request.param).placement


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_disk_leaves_nothing_behind(folder):
    model = tiny_llama()
    cache = kvplug.build("disk+int4(block=8, tail=8)", model.config)
    model.generate(prompt(40), **cache_argument(cache), max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(cache)
    assert len(list(folder.iterdir())) == 2
    assert not [p for p in folder.rglob("*") if p.is_file()], "files are unlinked once mapped"
    del cache
    gc.collect()
    assert len(list(folder.iterdir())) == 1
    assert twin.layers[0].keys.isfinite().all()
    del twin
    gc.collect()
    assert list(folder.iterdir()) == []


def test_disk_is_removed_after_an_exception(folder):
    model = tiny_llama()

    def fail(*_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        model.generate(
            prompt(40), max_new_tokens=4, cache_implementation="disk", stopping_criteria=[fail]
        )
    gc.collect()
    assert list(folder.iterdir()) == []


def test_disk_folder_of_ones_own(tmp_path):
    cache = kvplug.build(f"disk(folder={str(tmp_path)!r})", tiny_llama().config)
    (inside,) = tmp_path.iterdir()
    assert inside.name.startswith("kvplug-")
    del cache
    gc.collect()
    with pytest.raises(kvplug.SpecError, match="no such directory"):
        kvplug.parse(f"disk(folder={str(tmp_path / 'absent')!r})")


def test_disk_blocks_are_mapped_files():
    """The bytes of blocks lie in a file: the tensors are shared with it, not on the heap."""
    cache = kvplug.build("disk+int8(block=8)", tiny_llama().config)
    cache.layers[0].update(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16))
    for x in cache.layers[0].blocks.tensors.values():
        assert x.is_shared()
        maps = Path("/proc/self/maps")
        if maps.exists():
            spans = [line.split() for line in maps.read_text().splitlines() if "kvplug-" in line]
            ranges = [tuple(int(e, 16) for e in span[0].split("-")) for span in spans]
            assert any(low <= x.data_ptr() < high for low, high in ranges)


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
