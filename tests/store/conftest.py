"""Servers of the tests' own: what these packages and programs are not here for is skipped."""

import pytest

from kvplug.testing.server import NAMES, Server, binary


def started(folder):
    pytest.importorskip("redis")
    if binary() is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    return Server(folder)


@pytest.fixture(scope="session")
def server_process(tmp_path_factory):
    server = started(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def server(server_process):
    server_process.client.flushall()
    return server_process


@pytest.fixture
def own_server(tmp_path_factory):
    """One that may be ended."""
    server = started(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()
