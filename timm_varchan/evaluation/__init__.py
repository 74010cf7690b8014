"""Evaluation on sets of the channels."""

from typing import Any

from timm_varchan.errors import needs

with needs("train"):
    from timm_varchan.evaluation.evaluate import (
        Evaluation,
        OrderCheck,
        SetResult,
        Validation,
        default_modes,
        evaluate_channel_sets,
        predict_channel_sets,
        predicted_classes,
        validate_channel_sets,
    )
    from timm_varchan.evaluation.metrics import (
        METRICS,
        NO_CLASS,
        Difference,
        Estimate,
        classification_metrics,
        confusion_cells,
        paired_difference,
        wilson_interval,
    )
    from timm_varchan.evaluation.predictions import PREDICTIONS, Predictions, compare_predictions
    from timm_varchan.evaluation.sets import (
        DEFAULT_BUDGET,
        PlannedSet,
        parse_sets,
        plan_sets,
        set_label,
        spread,
    )
    from timm_varchan.evaluation.summary import (
        Band,
        Robustness,
        class_counts,
        foretold,
        main_series,
        rank_bands,
        robustness,
        smallest_difference,
        summarise_sizes,
    )
    from timm_varchan.views import MODES, ORDERS, SetView

__all__ = [
    "DEFAULT_BUDGET", "METRICS", "MODES", "NO_CLASS", "ORDERS", "PREDICTIONS", "Band",
    "ChannelSetMetrics", "Difference", "Estimate", "Evaluation", "OrderCheck", "PlannedSet",
    "Predictions", "Robustness", "SetResult", "SetView", "Validation", "class_counts",
    "classification_metrics", "compare_predictions", "confusion_cells", "default_modes",
    "evaluate_channel_sets", "foretold", "main_series", "paired_difference", "parse_sets",
    "plan_sets", "predict_channel_sets", "predicted_classes", "rank_bands", "robustness",
    "set_label", "smallest_difference", "spread", "summarise_sizes", "validate_channel_sets",
    "wilson_interval",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ChannelSetMetrics":  # `evaluate` imports much that training does not need
        from timm_varchan.evaluation.evaluate_module import ChannelSetMetrics

        return ChannelSetMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
