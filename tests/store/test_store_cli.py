"""`kvplug store`, and the counters as Prometheus reads them."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch

import kvplug
from kvplug.cli import main
from kvplug.store import keys
from kvplug.store.metrics import COUNTERS, REASONED
from kvplug.testing.store import chain

DASHBOARD = Path(__file__).parents[2] / "examples" / "store_dashboard.json"


@pytest.fixture
def store(tmp_path):
    made = kvplug.Store(tmp_path.as_uri())
    for salt, n in (("a", 3), ("b", 2)):
        made.save(chain(n, salt), ({"k": torch.zeros(1000)} for _ in range(n)))
    made.pin(chain(1, "a"))
    return made


def said(capsys, *argv, code=0):
    assert main(["store", *argv]) == code
    return capsys.readouterr().out


def test_stat_ls_clear(store, capsys):
    out = said(capsys, "stat", store.url)
    assert f"{store.url}: 5 records, 20" in out
    assert f"tenant {keys.tag('b').hex()}: 2 records, 8" in out
    rows = said(capsys, "ls", store.url, "--salt", "a").splitlines()
    assert len(rows) == 3
    assert {bytes.fromhex("".join(row.split()[:2])) for row in rows} == set(chain(3, "a"))
    assert sum(row.endswith("pinned") for row in rows) == 1
    assert said(capsys, "clear", store.url, "--salt", "b") == "2 records forgotten\n"
    assert (store.has(chain(3, "a")), store.has(chain(2, "b"))) == (3, 0)
    assert said(capsys, "clear", store.url) == "3 records forgotten\n"
    assert "0 records" in said(capsys, "stat", store.url)


def test_verify_forgets_what_is_bad(store, capsys):
    assert said(capsys, "verify", store.url) == "5 records are good, 0 were not\n"
    store._backend._path(chain(1, "a")[0]).write_bytes(b"x" * 200)
    store._backend._path(chain(2, "a")[1]).write_bytes(b"x")
    out = said(capsys, "verify", store.url, code=1)
    assert out == "3 records are good, 2 were not (1 truncated, 1 version)\n"
    assert said(capsys, "verify", store.url) == "3 records are good, 0 were not\n"


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    assert main(["store", "stat", "nowhere"]) == 2
    assert "'nowhere' is no URL of a store" in capsys.readouterr().err
    pytest.importorskip("redis")
    assert main(["store", "ls", "redis://127.0.0.1:1/0"]) == 2
    assert "redis://127.0.0.1:1/0 cannot be read: ConnectionError" in capsys.readouterr().err


def test_prometheus_reads_every_counter(store):
    client = pytest.importorskip("prometheus_client")
    from kvplug.store.prometheus import Collector

    list(store.load(chain(4, "a")))
    store.count("fallbacks", reason="images")
    registry = client.CollectorRegistry()
    registry.register(Collector(store, kvplug.Store("memory://")))
    text = client.generate_latest(registry).decode()
    for name in COUNTERS:
        assert f'kvplug_store_{name}_total{{store="{store.url}"}}' in text
        assert f'kvplug_store_{name}_total{{store="memory://"}} 0.0' in text
    assert f'kvplug_store_hits_total{{store="{store.url}"}} 3.0' in text
    assert f'kvplug_store_misses_total{{reason="absent",store="{store.url}"}} 1.0' in text
    assert f'kvplug_store_fallbacks_total{{reason="images",store="{store.url}"}} 1.0' in text
    held = store.stats()["held_bytes"]
    assert held == sum(e.size for e in store.entries())
    assert f'kvplug_store_held_bytes{{store="{store.url}"}} {float(held)}' in text
    with pytest.raises(kvplug.StoreError, match="two stores of one URL"):
        Collector(store, store)


def test_the_dashboard_asks_for_every_counter_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    names = {f"kvplug_store_{name}_total" for name in {**COUNTERS, **REASONED}}
    names.add("kvplug_store_held_bytes")
    for name in names:
        assert any(name in expr for expr in asked), name
    words = {w for expr in asked for w in expr.replace("(", " ").replace("[", " ").split()}
    assert {w for w in words if w.startswith("kvplug")} <= names


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_prometheus_shows_what_the_dashboard_asks_for(store, tmp_path):
    """A real one, that reads the counters from this process."""
    client = pytest.importorskip("prometheus_client")
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    from kvplug.store.prometheus import Collector

    list(store.load(chain(4, "a")))
    store.count("fallbacks", reason="images")
    registry = client.CollectorRegistry()
    registry.register(Collector(store))
    server, thread = client.start_http_server(0, "127.0.0.1", registry)
    config, own = tmp_path / "prometheus.yml", f"http://127.0.0.1:{free_port()}"
    job = {
        "job_name": "kvplug",
        "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
    }
    config.write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": [job]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/tsdb"]
    command += [f"--web.listen-address={own.removeprefix('http://')}", "--log.level=error"]

    def asked(expr):
        query = urllib.parse.urlencode({"query": expr.replace("$__rate_interval", "1m")})
        with urllib.request.urlopen(f"{own}/api/v1/query?{query}", timeout=9) as said:
            return json.load(said)["data"]["result"]

    panels = json.loads(DASHBOARD.read_text())["panels"]
    waiting = [t["expr"] for panel in panels for t in panel["targets"]]
    process, end = subprocess.Popen(command), time.monotonic() + 60
    try:
        while waiting and time.monotonic() < end:  # rates want two readings
            time.sleep(0.2)
            store.count("misses", reason="absent")  # a series that has just begun has no rate
            store.count("unsaved", reason="full")
            with contextlib.suppress(ConnectionError, urllib.error.URLError):  # it is starting
                waiting = [expr for expr in waiting if not asked(expr)]
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        thread.join()
        server.server_close()
    assert not waiting
