from dataclasses import dataclass, replace

import evaluate
import numpy as np
import pytest
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from evals import drift, strategies
from evals.strategies import Strategy


class BrokenLayer(DynamicLayer):
    """Two levels per number for all that is stored: a codec that does not work."""

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized and self.keys.numel():
            self.keys, self.values = (x.sign() * x.abs().mean() for x in (self.keys, self.values))
        return super().update(key_states, value_states, *args, **kwargs)


@dataclass(frozen=True)
class Broken(Strategy):
    """The negative control: it must be seen to be wrong."""

    def build(self, config, max_cache_len):
        return Cache(layers=[BrokenLayer() for _ in range(config.num_hidden_layers)])


@pytest.fixture
def exact():
    return strategies.resolve([])[0]


@pytest.fixture
def windows(config, text):
    ids = torch.tensor(list(text.encode()))
    return ids[: config.windows * config.window].view(config.windows, config.window)


@pytest.fixture
def measure(tiny, exact, windows, config):
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)
    return lambda strategy: drift.measure(tiny, strategy, windows, kept, config, lambda: None)


def test_the_exact_cache_does_not_drift_from_itself(measure, exact):
    result = measure(exact)
    assert result["kl"] == 0
    assert result["perplexity_delta"] == 0
    assert result["top1"] == 1


def test_a_broken_cache_drifts(measure):
    result = measure(Broken("broken"))
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
    result = drift.measure(tiny, exact, windows, kept, config, lambda: None)
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert result["positions"] == config.windows * (config.window - 1 - config.skip)


def test_one_forward_would_not_have_seen_the_broken_cache(tiny, exact, windows, config):
    config = replace(config, chunk=config.window)
    kept = drift.exact_predictions(tiny, exact, windows, config, lambda: None)
    blind = drift.measure(tiny, Broken("broken"), windows, kept, config, lambda: None)
    assert blind["kl"] == 0, "which is why text is fed in chunks"


def test_the_metric_is_what_its_description_says():
    metric = evaluate.load(str(drift.METRIC), keep_in_memory=True)
    result = metric.compute(
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


@pytest.mark.model
def test_the_packaged_model_on_wikitext_gives_the_known_figure(wikitext, config):
    from evals import data, model

    lm, tokenizer, _ = model.load()
    config = replace(config, windows=4, window=2048, chunk=64, skip=256)
    ids = data.load(str(wikitext)).tokens(tokenizer, 4 * 2048)
    nll = []
    for window in ids[: 4 * 2048].view(4, 2048):
        fed = drift.predictions(lm, strategies.resolve([])[0], window, config)
        nll += [-logp.gather(1, target[:, None])[:, 0].double() for logp, target in fed]
    assert torch.cat(nll).mean().exp().item() == pytest.approx(22.4388, abs=2e-4)
