"""Every back end that comes with kvplug against the contract."""

import pytest

from kvplug.testing import StoreConformance


class TestMemory(StoreConformance):
    @pytest.fixture
    def url(self):
        return "memory://"


class TestFiles(StoreConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return (tmp_path / "a folder").as_uri()


class TestRedis(StoreConformance):
    @pytest.fixture
    def url(self, server):
        return server.url


class TestRemote(StoreConformance):
    @pytest.fixture
    def url(self, tmp_path):
        pytest.importorskip("fsspec")
        return f"local://{tmp_path}/kv"
