"""Comparing two models, or one on two channel sets, on the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from timm_varchan.evaluation import paired_difference, wilson_interval


def exact_paired(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    """Accuracy of a minus accuracy of b, with the exact conditional interval and test.

    Given n images that only one of the two has right, the number that only a has is binomial; its
    Clopper-Pearson interval [l, u] makes the interval n (2l - 1) / N to n (2u - 1) / N of the
    difference. The test is the exact one of McNemar, and agrees with it. Where the two never
    differ, the interval is the exact one of how often they could.

    Args:
        correct_a: Whether a was right, one value an image.
        correct_b: Whether b was, on the same images in the same order.

    Returns:
        `difference`, `low`, `high`, `p`, `only_a`, `only_b`, `num_images`.
    """
    result = paired_difference(correct_a, correct_b)
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    only_a, only_b, total = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    discordant = only_a + only_b
    if discordant:
        bounds = stats.binomtest(only_a, discordant).proportion_ci(method="exact")
        low, high = (discordant * (2 * share - 1) / total for share in bounds)
    else:
        high = stats.binomtest(0, total).proportion_ci(method="exact").high
        low = -high
    return {
        "difference": result.difference, "low": float(low), "high": float(high), "p": result.p,
        "only_a": only_a, "only_b": only_b, "num_images": total,
    }  # fmt: skip


def share(events: np.ndarray) -> dict[str, float]:
    """How often something happens, with the Wilson interval."""
    happened, total = int(np.sum(events)), len(events)
    low, high = wilson_interval(happened, total)
    return {"value": happened / total, "low": low, "high": high}
