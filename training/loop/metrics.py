"""The language-model metrics, as `evaluate.Metric`s that need no download.

Each takes sums, not logits: `predictions` are totals over some tokens (one entry a batch, say) and `references` what to
divide by, so that a whole validation split costs a few numbers.
"""

import math

import datasets
import evaluate


class SummedMetric(evaluate.Metric):
    """A metric of (total, count) pairs; subclasses say which in `predictions_are` and `references_are`."""

    name, predictions_are, references_are = "summed", "totals", "counts"

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, config_name=self.name, **kwargs)

    def _build_data_dir(self) -> str:
        """No folder is made for what is kept in memory: HOME may be a place where nobody may write."""
        return self._data_dir_root

    def _info(self):
        return evaluate.MetricInfo(
            description=f"{type(self).__doc__} predictions: {self.predictions_are}; references: {self.references_are}.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        count = math.fsum(references)
        if not count:
            raise ValueError(f"{self.name}: nothing to count ({self.references_are} sum to 0)")
        return {self.name: self._finish(math.fsum(predictions) / count)}

    @staticmethod
    def _finish(ratio: float) -> float:
        return ratio


class Loss(SummedMetric):
    """Cross entropy in nats a token."""

    name, predictions_are, references_are = "loss", "nats", "tokens"


class Perplexity(SummedMetric):
    """The exponential of the loss."""

    name, predictions_are, references_are = "perplexity", "nats", "tokens"

    @staticmethod
    def _finish(ratio):
        return math.exp(ratio) if ratio < 700 else math.inf


class BitsPerByte(SummedMetric):
    """Cross entropy in bits a UTF-8 byte of text: comparable between tokenizers."""

    name, predictions_are, references_are = "bits_per_byte", "nats", "bytes"

    @staticmethod
    def _finish(ratio):
        return ratio / math.log(2)


class TokenAccuracy(SummedMetric):
    """Share of tokens whose likeliest prediction is right."""

    name, predictions_are, references_are = "token_accuracy", "tokens predicted right", "tokens"


METRICS = {metric.name: metric for metric in (Loss, Perplexity, BitsPerByte, TokenAccuracy)}


def language_metrics(nats: list[float], right: list[float], tokens: list[float], num_bytes: float) -> dict:
    """All four metrics of batches: summed nats, right predictions and tokens a batch, and bytes of the whole text."""
    inputs = {
        "loss": (nats, tokens),
        "perplexity": (nats, tokens),
        "bits_per_byte": ([math.fsum(nats)], [num_bytes]),
        "token_accuracy": (right, tokens),
    }
    results = {}
    for name, (predictions, references) in inputs.items():
        results |= METRICS[name]().compute(predictions=predictions, references=references)
    return results
