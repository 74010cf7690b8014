"""What the results of many channel sets say: by size, by band, by class, and as one number."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from timm_varchan.evaluation.evaluate import SetResult
from timm_varchan.evaluation.metrics import Difference, Estimate, paired_difference

#: Sets that somebody chose: they are not what an average set of their size does.
_CHOSEN = ("natural", "asked")


class SizeSummary(NamedTuple):
    """Accuracy over the evaluated sets of one size, of one mode and order.

    Sets that somebody chose (natural ones, those asked for) count only where no others of the size
    were evaluated: they are no sample. `std` is the spread between sets, not between seeds.
    """

    size: int
    mode: str
    order: str
    num_sets: int
    num_possible: int
    mean: float
    std: float
    worst: float
    worst_set: str
    best: float
    best_set: str


def summarise_sizes(results: Sequence[SetResult]) -> list[SizeSummary]:
    """Mean and range of the accuracy over the sets of each size, for each mode and order."""
    count = max((result.size for result in results), default=0)
    groups: dict[tuple[int, str, str], list[SetResult]] = {}
    for result in results:
        groups.setdefault((result.size, result.mode, result.order), []).append(result)
    summaries = []
    for (size, mode, order), group in groups.items():
        drawn = [result for result in group if result.kind not in _CHOSEN] or group
        values = [result.accuracy for result in drawn]
        worst, best = (choose(drawn, key=lambda result: result.accuracy) for choose in (min, max))
        summaries.append(
            SizeSummary(
                size, mode, order, len(drawn), math.comb(count, size),
                statistics.fmean(values), statistics.pstdev(values),
                worst.accuracy, worst.name, best.accuracy, best.name,
            )
        )  # fmt: skip
    return summaries


def main_series(results: Sequence[SetResult]) -> list[SetResult]:
    """The results of the first mode, in order: what the summaries for people are made of."""
    first = results[0]
    return [r for r in results if (r.mode, r.order) == (first.mode, first.order)]


@dataclass(frozen=True)
class Band:
    """What one channel is worth; None where a set was not evaluated.

    Args:
        name: The channel.
        index: Its position in the data.
        loss_without: Accuracy on all channels minus accuracy on all but this one, same images.
        alone: Accuracy on this channel alone.
        loss_alone: Accuracy on all channels minus `alone`, same images.
    """

    name: str
    index: int
    loss_without: Difference | None
    alone: Estimate | None
    loss_alone: Difference | None

    @property
    def certain(self) -> bool:
        """Whether the interval of the loss without it leaves out 0."""
        loss = self.loss_without
        return loss is not None and not loss.low <= 0 <= loss.high


def rank_bands(results: Sequence[SetResult]) -> list[Band]:
    """The channels that were evaluated alone or left out, by what is lost without them.

    Args:
        results: From `evaluate_channel_sets`.

    Returns:
        The channels, of the first mode and order; none if there are fewer than two. First those
        without which accuracy certainly falls, the greatest loss first, last those without which it
        certainly rises; between them, in the order of the data, all of which the images cannot
        tell either.
    """
    by_indices = {r.indices: r for r in main_series(results)}
    whole = max(by_indices, key=len)
    full, bands = by_indices[whole], []
    for place in whole if len(whole) > 1 else ():
        alone, without = (
            by_indices.get((place,)),
            by_indices.get(tuple(i for i in whole if i != place)),
        )
        if alone is None and without is None:
            continue
        parts = full.channels.split("+") if "+" in full.channels else list(full.channels)
        name = parts[place] if len(parts) == full.size else f"#{place + 1}"
        bands.append(
            Band(
                alone.channels if alone else name,
                place,
                paired_difference(full.correct, without.correct) if without else None,
                alone.metrics["accuracy"] if alone else None,
                paired_difference(full.correct, alone.correct) if alone else None,
            )
        )

    def worth(band: Band) -> float:
        return band.loss_without.difference if band.loss_without and band.certain else 0.0

    return sorted(bands, key=worth, reverse=True)


class Robustness(NamedTuple):
    """How much of a model is left when channels are missing.

    Args:
        full: Accuracy on all channels.
        uniform_mean: Mean over the sizes 1..C of the mean accuracy over the sets of a size: what to
            expect if first the number of channels is drawn and then which. Sizes that were not
            evaluated are interpolated between their neighbours.
        num_sizes: Sizes that were evaluated.
        worst_loss: Greatest loss of accuracy by leaving out a single channel, on the same images;
            None where no channel was left out.
        worst_channel: Which one.
    """

    full: float
    uniform_mean: float
    num_sizes: int
    worst_loss: Difference | None
    worst_channel: str | None


def robustness(results: Sequence[SetResult]) -> Robustness | None:
    """The uniform mean and the worst single loss, of the first mode and order.

    Source: the distribution of hierarchical channel sampling, ChannelViT, arXiv:2309.16108,
    section 3.3, whose tables give the mean for each number of channels; the mean over the numbers
    is ours.

    Returns:
        None where fewer than two sizes, or not size 1, were evaluated: nothing to interpolate.
    """
    series = main_series(results)
    means = {summary.size: summary.mean for summary in summarise_sizes(series)}
    count = max(means)
    if count < 2 or 1 not in means:
        return None
    sizes = sorted(means)
    mean = np.interp(range(1, count + 1), sizes, [means[size] for size in sizes]).mean()
    losses = {band.name: band.loss_without for band in rank_bands(series) if band.loss_without}
    worst = max(losses, key=lambda name: losses[name].difference, default=None)
    loss = None if worst is None else losses[worst]
    return Robustness(means[count], float(mean), len(sizes), loss, worst)


def foretold(results: Sequence[SetResult], unexplained: Sequence[float | None]) -> float | None:
    """Whether the variance that a set leaves unexplained ranks the sets as their accuracy does.

    It foretells which of many sets of several channels lose more (0.85 over the 40 default sets of
    EuroSAT's 13 bands), much less which single channel does best (0.37), and no number of points.

    Args:
        results: From `evaluate_channel_sets`.
        unexplained: Of each of them the unexplained variance, None where it is not known.

    Returns:
        Spearman's rank correlation with the loss of accuracy, from -1 to 1; None for fewer than
        three sets or where all are equal.
    """
    pairs = [(u, -r.accuracy) for r, u in zip(results, unexplained, strict=True) if u is not None]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def smallest_difference(num_images: int) -> int:
    """How many images two channel sets or models must differ in, at best, to be told apart.

    At best: every image that changes, changes for the better. A smaller difference in accuracy on
    the same images has an interval that holds 0, whatever the answers were.

    Returns:
        The number of images; more than there are where nothing can be told.
    """
    for changed in range(1, num_images + 1):
        better = np.arange(num_images) < changed
        if paired_difference(better, np.zeros(num_images)).low > 0:
            return changed
    return num_images + 1


class ClassCounts(NamedTuple):
    """The images of one class: all, those recognised, those said to be of it, the worst mistake."""

    name: str
    num_images: int
    num_right: int
    num_said: int
    mistaken_for: str


def class_counts(cells: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[ClassCounts]:
    """Counts a class, from `confusion_cells`, of the classes that have images, in order."""
    counts_said, rows = Counter[int](), dict[int, dict[int, int]]()
    for true, predicted, count in cells:
        counts_said[predicted] += count
        rows.setdefault(true, {})[predicted] = count
    names, found = [*class_names, "no answer"], []
    for true, answers in sorted(rows.items()):
        total, right = sum(answers.values()), answers.pop(true, 0)
        most = max(answers, key=lambda other: answers[other], default=None)
        mistaken = "" if most is None else f"{names[most]} ({answers[most]})"
        found.append(ClassCounts(names[true], total, right, counts_said[true], mistaken))
    return found
