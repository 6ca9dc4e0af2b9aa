"""A Redis or Valkey server of the tests' own, on a socket in a folder: no port is taken."""

import shutil
import subprocess
import time

import pytest

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")


class Server:
    def __init__(self, folder, binary):
        redis = pytest.importorskip("redis")
        self.url = f"unix://{folder}/s"
        self.process = subprocess.Popen(
            [binary, "--port", "0", "--unixsocket", f"{folder}/s", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis.from_url(self.url)
        for _ in range(100):
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                time.sleep(0.05)
        raise RuntimeError(f"{binary} does not answer")


@pytest.fixture(scope="session")
def server_process(tmp_path_factory):
    if SERVER is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    server = Server(tmp_path_factory.mktemp("redis"), SERVER)
    yield server
    server.client.close()
    server.process.kill()
    server.process.wait()


@pytest.fixture
def server(server_process):
    server_process.client.flushall()
    return server_process
