"""The metrics of every result as a module of `evaluate`; apart, as its import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from timm_varchan.evaluation.metrics import Estimate, classification_metrics


class ChannelSetMetrics(evaluate.Metric):  # type: ignore[misc]
    """Accuracy and macro precision, recall and f1 with 95 % intervals, without the hub.

    It lives in memory and in one process: gather predictions first, every process then computes the
    same values. `compute` takes `num_classes` and the `seed` of the intervals; a class without
    images counts as 0 in the means.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, num_process=1, **kwargs)

    def _info(self) -> Any:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy and macro-averaged precision, recall and f1.",
            citation="",
            inputs_description="Predicted and true class indices.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(
        self,
        predictions: Sequence[int],
        references: Sequence[int],
        num_classes: int,
        seed: int = 0,
    ) -> dict[str, Estimate]:
        """The estimates by name, those of `METRICS` in order."""
        return classification_metrics(predictions, references, num_classes, seed=seed)
