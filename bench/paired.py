"""What is made of the predictions of every set: comparisons on the same images, summaries."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy import stats

from timm_varchan import ChannelSet
from timm_varchan.evaluation import (
    SetResult,
    paired_difference,
    summarise_sizes,
    wilson_interval,
)

#: By positions of the channels, mode and order.
Results = dict[tuple[tuple[int, ...], str, str], SetResult]


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


def by_view(results: list[SetResult]) -> Results:
    """Results by positions of the channels, mode and order: names need not tell sets apart."""
    return {(r.indices, r.mode, r.order): r for r in results}


def series_rows(results: Results) -> list[dict[str, Any]]:
    """For each mode and order: all channels, the mean over sizes of the mean over sets, the worst.

    The uniform mean is the accuracy to expect when the number of channels is drawn uniformly and
    then the set: as hierarchical channel sampling draws them.
    """
    rows = []
    for mode, order in dict.fromkeys((mode, order) for _, mode, order in results):
        own = [r for r in results.values() if (r.mode, r.order) == (mode, order)]
        worst = min(own, key=lambda r: r.metrics["accuracy"].value)
        rows.append({
            "mode": mode, "order": order,
            "full": max(own, key=lambda r: r.size).metrics["accuracy"].value,
            "uniform_mean": float(np.mean([s.mean for s in summarise_sizes(own)])),
            "worst": worst.metrics["accuracy"].value, "worst_set": worst.channels,
        })  # fmt: skip
    return rows


def leave_one_out(results: Results, channels: ChannelSet) -> list[dict[str, Any]]:
    """What each single channel is worth: without it minus with all."""
    rows = []
    for (indices, mode, order), full in results.items():
        if len(indices) != len(channels) or len(channels) < 2:
            continue
        for position, channel in enumerate(channels):
            rest = tuple(i for i in indices if i != position)
            without = results.get((rest, mode, order))
            if without is not None:
                rows.append({"mode": mode, "order": order, "left_out": channel.label,
                             "paired": exact_paired(without.correct, full.correct)})  # fmt: skip
    return rows


def flips(results: Results) -> list[dict[str, Any]]:
    """How often the answer changes when the planes are shuffled or come twice."""
    rows = []
    for (indices, mode, order), first in results.items():
        if order != "in order" or mode == "anonymous, twice":
            continue
        others = {"shuffled": results.get((indices, mode, "shuffled"))}
        if mode == "anonymous":
            others["every channel twice"] = results.get((indices, "anonymous, twice", "in order"))
        rows += [
            {"channels": first.channels, "mode": mode, "change": change,
             "rate": share(first.predictions != other.predictions)}
            for change, other in others.items() if other is not None
        ]  # fmt: skip
    return rows


def expert_gaps(results: Results, experts: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The model minus the expert of each set that has one."""
    return [
        {"mode": result.mode, "order": result.order, "channels": result.channels,
         "expert": f"expert {result.channels}",
         "paired": exact_paired(result.correct, experts[result.channels])}
        for result in results.values() if result.channels in experts
    ]  # fmt: skip


def pairs(results: dict[str, Results], modes: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Every two models on every set: each as it is best told, and in the modes they share."""
    rows = []
    for a, b in itertools.combinations(results, 2):
        shared = [(mode, mode) for mode in modes[a] if mode in modes[b]]
        for mode_a, mode_b in dict.fromkeys([(modes[a][0], modes[b][0]), *shared]):
            for (indices, mode, order), first in results[a].items():
                second = results[b].get((indices, mode_b, order))
                if mode == mode_a and second is not None:
                    rows.append({
                        "a": a, "b": b, "channels": first.channels,
                        "mode_a": mode_a, "mode_b": mode_b, "order": order,
                        "paired": exact_paired(first.correct, second.correct),
                    })  # fmt: skip
    return rows
