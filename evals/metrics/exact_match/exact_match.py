"""exact_match: the share of texts that are equal to their reference.

An `evaluate` metric with the name and the arguments of the Hub's, loaded from this folder by path,
so that it works offline.
"""

import datasets
import evaluate

DESCRIPTION = "The share of predictions that are equal to their reference, character by character."

INPUTS = """
Args:
    predictions: texts.
    references: the text that each should be.

Returns:
    exact_match, from 0 to 1.
"""


class ExactMatch(evaluate.Metric):
    """Equality, nothing ignored."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = [ours == theirs for ours, theirs in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
