"""One thread (tiny models are slower with two), and `--regen` for golden bytes."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--regen", action="store_true", help="write tests/golden/*.json anew")


@pytest.fixture
def golden(request):
    return {
        "folder": Path(__file__).parent / "golden",
        "regen": request.config.getoption("--regen"),
    }
