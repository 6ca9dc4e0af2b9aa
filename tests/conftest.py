"""One thread (tiny models are slower with two), one compilation, `--regen`, a model, a prompt."""

import gc
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from kvplug.testing.tools import prompt, tiny_llama

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


def pytest_collection_modifyitems(items):
    """First what is long and needs no CPU kernel: another worker compiles that meanwhile."""
    items.sort(key=lambda item: item.name != "test_interpreted")


def pytest_collection_finish(session):
    """What is imported by now stays: a collection in a test looks at what tests have made."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """Of several workers that come to need the CPU kernel, one compiles it, the others wait."""
    try:
        import fcntl

        import numba  # noqa: F401
    except ImportError:  # no such locks, or no such kernel
        yield
        return
    from kvplug.kernels.numba import process

    compiled, path = process.compiled, tmp_path_factory.getbasetemp().parent / "kernel.lock"

    @cache
    def one_by_one(function):
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return compiled.__wrapped__(function)

    process.compiled = one_by_one
    yield
    process.compiled = compiled


def pytest_addoption(parser):
    parser.addoption("--regen", action="store_true", help="write tests/golden/*.json anew")


@pytest.fixture
def golden(request):
    return {
        "folder": Path(__file__).parent / "golden",
        "regen": request.config.getoption("--regen"),
    }


@pytest.fixture
def model():
    """What tests of `generate` run, where they need no other."""
    return tiny_llama()


@pytest.fixture
def ids():
    """And its prompt."""
    return prompt(21)
