"""kv_drift: what replacing a KV cache did to next-token predictions.

An `evaluate` metric, loaded from this folder by path, so that it works offline.
"""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Compares a language model that runs on some KV cache to the same model on an exact one, position by
position: perplexity and its change, mean KL(exact || cache), and how often both predict the same
token. Perplexity moves by luck on short texts; KL and agreement order caches reliably.
"""

INPUTS = """
Args:
    nll: negative log-likelihood of the next token with the cache under test, nats, per position.
    exact_nll: the same with the exact cache.
    kl: KL(exact || cache) between the two next-token distributions, in nats.
    agree: whether both distributions have the same most likely token.

Returns:
    perplexity, exact_perplexity, perplexity_delta (%), kl (mean), kl_p99, top1 (share), positions.
"""

CITATION = """
@misc{llama.cpp-perplexity,
  title = {llama.cpp: perplexity and KL divergence of quantized models}, year = {2024}}
"""


class KvDrift(evaluate.Metric):
    """Means over positions; what is per position the caller computes, who has the logits."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("float64") for name in ("nll", "exact_nll", "kl")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features | {"agree": datasets.Value("bool")}),
        )

    def _compute(self, nll: list, exact_nll: list, kl: list, agree: list) -> dict[str, float]:
        perplexity, exact = (float(np.exp(np.mean(x))) for x in (nll, exact_nll))
        return {
            "perplexity": perplexity,
            "exact_perplexity": exact,
            "perplexity_delta": 100 * (perplexity / exact - 1),
            "kl": float(np.mean(kl)),
            "kl_p99": float(np.percentile(kl, 99)),
            "top1": float(np.mean(agree)),
            "positions": len(kl),
        }
