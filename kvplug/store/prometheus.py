"""`Store.stats()` for Prometheus, by prometheus-client.

```python
from prometheus_client import REGISTRY, start_http_server
REGISTRY.register(Collector(store))
start_http_server(9400)
```

`examples/store_dashboard.json` shows what it counts in Grafana.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import StoreError
from ..registry import load
from .metrics import COUNTERS, REASONED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from .store import Store

core = load("prometheus_client.core", "kvplug.store.prometheus")
PREFIX = "kvplug_store_"


class Collector:
    """Reads the counters of stores whenever Prometheus asks; label `store` is the URL.

    Raises StoreError for two stores of one URL: what they count could not be told apart.
    """

    def __init__(self, *stores: Store) -> None:
        urls = [store.url for store in stores]
        if len(set(urls)) < len(urls):
            raise StoreError(f"two stores of one URL: {', '.join(sorted(urls))}")
        self._stores = stores

    def collect(self) -> Iterator[Metric]:
        """One family for each counter, those with reasons by `reason`, and the bytes held."""
        stats = [store.stats() for store in self._stores]
        for name, what in COUNTERS.items():
            family = core.CounterMetricFamily(PREFIX + name, what, labels=["store"])
            for x in stats:
                family.add_metric([x["url"]], x[name])
            yield family
        for name, what in REASONED.items():
            family = core.CounterMetricFamily(PREFIX + name, what, labels=["store", "reason"])
            for x in stats:
                for reason, n in x[name].items():
                    family.add_metric([x["url"], reason], n)
            yield family
        held = core.GaugeMetricFamily(
            PREFIX + "held_bytes", "bytes of all records, where that is known", labels=["store"]
        )
        for x in stats:
            if x["held_bytes"] is not None:
                held.add_metric([x["url"]], x["held_bytes"])
        yield held
