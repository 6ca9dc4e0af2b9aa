"""The `evaluate` metrics say what their descriptions say."""

import numpy as np
import pytest

from evals import metrics


def test_the_metric_is_what_its_description_says():
    result = metrics.load("kv_drift").compute(
        nll=[1.0, 3.0], exact_nll=[1.0, 2.0], kl=[0.0, 0.5], agree=[True, False]
    )
    assert result == {
        "perplexity": pytest.approx(np.exp(2)),
        "exact_perplexity": pytest.approx(np.exp(1.5)),
        "perplexity_delta": pytest.approx(100 * (np.exp(0.5) - 1)),
        "kl": 0.25,
        "kl_p99": pytest.approx(0.495),
        "top1": 0.5,
        "positions": 2,
    }


def test_words_are_scored_as_published():
    said, meant = "the cat sat on the mat", "the cat lay on a mat"
    both = {"predictions": [said, meant], "references": [meant, meant]}
    exact, rouge = (metrics.load(name).compute(**both) for name in ("exact_match", "rouge"))
    assert exact == {"exact_match": 0.5}
    assert rouge == pytest.approx({"rouge1": (4 / 6 + 1) / 2, "rougeL": (4 / 6 + 1) / 2})
