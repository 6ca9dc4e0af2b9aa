"""A Redis or Valkey server of one's own, as Debian packages it, for tests and measurements."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NAMES = "valkey-server", "redis-server"


def binary() -> str | None:
    """The server that is installed here, None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Server:
    """A server that keeps nothing on disk: on a socket in `folder`, or on a port of this machine.

    url: what `kvplug.Store` is given; client: redis-py's. Raises RuntimeError where none answers.
    """

    def __init__(self, folder: Path, on_port: bool = False) -> None:
        import redis

        if on_port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.url, where = f"redis://127.0.0.1:{port}/0", ["--port", str(port)]
        else:
            self.url, where = f"unix://{folder}/s", ["--port", "0", "--unixsocket", f"{folder}/s"]
        self.process = subprocess.Popen(
            [binary(), *where, "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis.from_url(self.url)
        end = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                if time.monotonic() > end:
                    self.close()
                    raise RuntimeError(f"{binary()} does not answer") from None
                time.sleep(0.02)

    def pause(self) -> None:
        """Answer nobody until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a pause."""
        self.process.send_signal(signal.SIGCONT)

    def fill(self) -> None:
        """Refuse every write from now on, as a server does that is full and may evict nothing."""
        self.client.config_set("maxmemory", "1mb")

    def close(self) -> None:
        """End it as it stands."""
        self.client.close()
        self.process.kill()
        self.process.wait()
