"""rouge: how many words, and how long a sequence of them, two texts share.

An `evaluate` metric with the name and the arguments of the Hub's, loaded from this folder by path,
so that it works offline; the scores are Google's `rouge_score`, as they are there.
"""

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

TYPES = ["rouge1", "rougeL"]

DESCRIPTION = "F1 of shared words (rouge1) and of the longest common sequence of words (rougeL)."

INPUTS = """
Args:
    predictions: texts.
    references: the text that each is compared to.

Returns:
    rouge1 and rougeL, F1 from 0 to 1, mean over the texts.
"""

CITATION = """
@inproceedings{lin-2004-rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries}, author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out}, year = {2004}}
"""


class Rouge(evaluate.Metric):
    """Means over texts."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scorer = RougeScorer(TYPES)
        scores = [
            scorer.score(theirs, ours) for ours, theirs in zip(predictions, references, strict=True)
        ]
        return {name: sum(one[name].fmeasure for one in scores) / len(scores) for name in TYPES}
