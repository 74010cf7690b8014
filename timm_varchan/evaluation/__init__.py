"""Evaluation on every subset of the channels."""

from timm_varchan.evaluation.channel_sets import (
    SetResult,
    SizeSummary,
    default_modes,
    evaluate_channel_sets,
    has_stems,
    predict_channel_sets,
    summarise_sizes,
)
from timm_varchan.evaluation.metrics import (
    METRICS,
    ChannelSetMetrics,
    Difference,
    Estimate,
    classification_metrics,
    paired_difference,
    wilson_interval,
)
from timm_varchan.views import MAX_SETS, MODES, ORDERS, SetView, choose_sets

__all__ = [
    "MAX_SETS",
    "METRICS",
    "MODES",
    "ORDERS",
    "ChannelSetMetrics",
    "Difference",
    "Estimate",
    "SetResult",
    "SetView",
    "SizeSummary",
    "choose_sets",
    "classification_metrics",
    "default_modes",
    "evaluate_channel_sets",
    "has_stems",
    "paired_difference",
    "predict_channel_sets",
    "summarise_sizes",
    "wilson_interval",
]
