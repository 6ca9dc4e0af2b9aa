"""Conformance suites for plugins: subclass one, override its fixture, and pytest runs the contract.

```python
from kvplug.testing import CodecConformance, StrategyConformance

class TestMyCodec(CodecConformance):
    @pytest.fixture
    def codec(self):
        return MyCodec(block=8)

class TestMyStrategy(StrategyConformance):
    @pytest.fixture
    def spec(self):
        return "sinks(sinks=2, window=10)+mycodec(block=8)"
```

A suite asks the stage itself what it promises (`codec.lossless`, `codec.max_error`,
`retention.newest`, ...) and skips, with the reason, what it does not promise. Models are tiny,
random and built from a config: nothing is downloaded. Use small blocks and windows, so that short
sequences reach every edge. Needs pytest and hypothesis, which only this package imports.
"""

from .codec import CodecConformance, check_golden
from .kernel import KernelConformance
from .memory import peak_bytes, walked_bytes
from .placement import PlacementConformance
from .retention import RetentionConformance
from .store import StoreConformance
from .strategy import StrategyConformance
from .tools import tiny_llama

__all__ = [
    "CodecConformance",
    "KernelConformance",
    "PlacementConformance",
    "RetentionConformance",
    "StoreConformance",
    "StrategyConformance",
    "check_golden",
    "peak_bytes",
    "tiny_llama",
    "walked_bytes",
]
