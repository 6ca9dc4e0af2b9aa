"""Result folders written by hand, one per suite."""

import made_runs as made
import pytest


@pytest.fixture
def folders(tmp_path):
    return [made.folder(tmp_path / "out", suite, made.rows(suite)) for suite in made.SUITES]
