"""One thread (tiny models are slower with two), and `--regen` for golden bytes."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# for real models and for processes that tests start: pools of several workers fight for the cores
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)


@pytest.fixture(scope="session")
def threads():
    """How many threads a test may keep busy."""
    return THREADS


def pytest_addoption(parser):
    parser.addoption("--regen", action="store_true", help="write tests/golden/*.json anew")


@pytest.fixture
def golden(request):
    return {
        "folder": Path(__file__).parent / "golden",
        "regen": request.config.getoption("--regen"),
    }
