from dataclasses import replace

import numpy as np
import pytest
import torch

from evals.measure import drift
from evals.setup import control
from evals.setup.contenders import resolve
from evals.setup.control import Broken


@pytest.fixture
def exact():
    return resolve([])[0]


@pytest.fixture
def windows(config, text):
    ids = torch.tensor(list(text.encode()))
    return ids[: config.windows * config.window].view(config.windows, config.window)


@pytest.fixture
def measure(tiny, exact, windows, config):
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)

    def measure(contender):
        positions = drift.measure(tiny, contender, windows, kept, config, lambda: None)
        return drift.overall(positions)

    return measure


def test_the_exact_cache_does_not_drift_from_itself(measure, exact):
    result = measure(exact)
    assert result["kl"] == 0
    assert result["perplexity_delta"] == 0
    assert result["top1"] == 1


def test_a_broken_cache_drifts(measure):
    result = measure(Broken())
    assert result["kl"] > 0.1
    assert result["top1"] < 0.9


@pytest.mark.parametrize("chunk", [16, 7, 300])
def test_perplexity_is_that_of_a_plain_forward_with_labels(
    tiny, exact, windows, config, chunk, measure
):
    config = replace(config, chunk=chunk)  # divides the window, does not, and exceeds it
    labels = windows.clone()
    labels[:, : config.skip + 1] = -100  # position `skip` predicts token skip + 1
    with torch.no_grad():
        loss = tiny(input_ids=windows, labels=labels, use_cache=False).loss.item()
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)
    result = drift.overall(drift.measure(tiny, exact, windows, kept, config, lambda: None))
    assert drift.exact_perplexity(kept, windows, config) == pytest.approx(result["perplexity"])
    assert drift.plain_perplexity(tiny, windows, config) == pytest.approx(np.exp(loss), rel=1e-4)
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert result["positions"] == config.windows * (config.window - 1 - config.skip)


def test_one_forward_would_not_have_seen_the_broken_cache(tiny, exact, windows, config):
    config = replace(config, chunk=config.window)
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)
    blind = drift.overall(drift.measure(tiny, Broken(), windows, kept, config, lambda: None))
    assert blind["kl"] < 1e-9, "which is why text is fed in chunks"
    with pytest.raises(control.SelfCheckFailed, match="the broken codec shows a KL of only"):
        control.check_broken(blind)


def test_rows_have_spread_over_windows_and_positions_fall_in_buckets(tiny, exact, windows, config):
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)
    positions = drift.measure(tiny, Broken(), windows, kept, config, lambda: None)
    rows = {row["metric"]: row for row in drift.rows(positions)}
    assert rows["kl"]["n"] == config.windows
    assert rows["kl"]["p20"] < rows["kl"]["value"] < rows["kl"]["p80"]
    ranges = list(drift.buckets(config))
    assert [label for label, *_ in ranges] == ["20-32", "32-64", "64-128", "128-192"]
    counted = [next(drift.rows(positions, *ends))["note"].split()[1] for _, *ends in ranges]
    assert sum(map(int, counted)) == config.windows * (config.window - 1 - config.skip)


@pytest.mark.model
def test_the_packaged_model_on_wikitext_gives_the_known_figure(wikitext, config):
    """That of one forward of transformers' over the first 1,024 tokens, without a cache."""
    from evals.setup import data, model

    lm, tokenizer, _ = model.load()
    config = replace(config, windows=1, window=1024, chunk=64, skip=256)
    window = data.load(str(wikitext)).tokens(tokenizer, 1024)[:1024]
    fed = drift.predictions(lm, resolve([])[0], window, config)
    nll = [-logp.gather(1, target[:, None])[:, 0].double() for logp, target in fed]
    assert torch.cat(nll).mean().exp().item() == pytest.approx(10.3193, abs=2e-4)
