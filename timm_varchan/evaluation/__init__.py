"""Evaluation on sets of the channels."""

from typing import Any

from timm_varchan.errors import needs

with needs("train"):
    from timm_varchan.evaluation.channel_sets import (
        BatchNormBuffers,
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
        confusion_counts,
        paired_difference,
        wilson_interval,
    )
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
        SizeSummary,
        foretold,
        main_series,
        rank_bands,
        robustness,
        summarise_sizes,
    )
    from timm_varchan.views import MAX_SETS, MODES, ORDERS, SetView, choose_sets

__all__ = [
    "DEFAULT_BUDGET",
    "MAX_SETS",
    "METRICS",
    "MODES",
    "NO_CLASS",
    "ORDERS",
    "Band",
    "BatchNormBuffers",
    "ChannelSetMetrics",
    "Difference",
    "Estimate",
    "Evaluation",
    "OrderCheck",
    "PlannedSet",
    "Robustness",
    "SetResult",
    "SetView",
    "SizeSummary",
    "Validation",
    "choose_sets",
    "classification_metrics",
    "confusion_counts",
    "default_modes",
    "evaluate_channel_sets",
    "foretold",
    "main_series",
    "paired_difference",
    "parse_sets",
    "plan_sets",
    "predict_channel_sets",
    "predicted_classes",
    "rank_bands",
    "robustness",
    "set_label",
    "spread",
    "summarise_sizes",
    "validate_channel_sets",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    if name == "ChannelSetMetrics":  # `evaluate` imports much that training does not need
        from timm_varchan.evaluation.evaluate_module import ChannelSetMetrics

        return ChannelSetMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
