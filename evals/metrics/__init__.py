"""`evaluate` metrics, a folder each, loaded by path so that they work offline."""

from pathlib import Path

import evaluate


def load(name: str) -> evaluate.Metric:
    """Return a metric by its folder's name."""
    return evaluate.load(str(Path(__file__).parent / name), keep_in_memory=True)
