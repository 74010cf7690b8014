"""Classification metrics that work offline, with 95 % intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, stats

from timm_varchan.errors import UserError

__all__ = [
    "METRICS",
    "NO_CLASS",
    "Difference",
    "Estimate",
    "classification_metrics",
    "confusion_counts",
    "metric_values",
    "paired_difference",
    "wilson_interval",
]

#: The metrics of every result, in the order of the tables.
METRICS = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
#: In place of a predicted class where a logit is not a finite number: wrong, whatever the label.
NO_CLASS = -100
NUM_BOOTSTRAP_DRAWS = 1000
_BOOTSTRAP_CHUNK = 100  # draws at once: bounds the memory with many classes


class Estimate(NamedTuple):
    """A metric in 0..1 and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Accuracy of a minus accuracy of b on the same images, its 95 % interval, and a p-value."""

    difference: float
    low: float
    high: float
    p: float


def confusion_counts(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Images by true and predicted class, `(classes, classes + 1)`: the last have no answer.

    Raises:
        UserError: No images, or classes outside `range(num_classes)`.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references) or len(references) != len(predictions):
        raise UserError(
            f"{len(predictions)} predictions came for {len(references)} labels; give one of each "
            f"for at least one image."
        )
    classes = np.concatenate([predictions[predictions != NO_CLASS], references])
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if outside.size:
        raise UserError(
            f"Class {outside[0]} is outside the {num_classes} classes; raise num_classes."
        )
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    column = np.where(predictions == NO_CLASS, num_classes, predictions)
    np.add.at(counts, (references, column), 1)
    return counts


def metric_values(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
) -> dict[str, float]:
    """The metrics of `METRICS` by name, without intervals; as scikit-learn has them."""
    return _values(confusion_counts(predictions, references, num_classes))


def _values(counts: np.ndarray) -> dict[str, float]:
    hits = counts.diagonal()
    macro = _macro(hits, counts.sum(1), counts[:, :-1].sum(0))
    return dict(zip(METRICS, (float(hits.sum() / counts.sum()), *macro.tolist()), strict=True))


def _macro(hits: np.ndarray, support: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    """Macro precision, recall and f1 `(..., 3)` of counts a class; 0 where there is nothing."""
    shares = ((hits, guessed), (hits, support), (2 * hits, support + guessed))
    return np.stack([(part / np.maximum(whole, 1)).mean(-1) for part, whole in shares], -1)


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, also where it is 0 or 1.

    Source: Wilson, JASA 22 (1927), as SciPy has it.
    """
    if total < 1:
        raise UserError(f"A proportion needs at least one image, not {total}.")
    found = stats.binomtest(successes, total).proportion_ci(method="wilson")
    share = successes / total
    # Rounding must not put the estimate outside its own interval.
    return min(float(found.low), share), max(float(found.high), share)


def _bootstrap(counts: np.ndarray, seed: int) -> np.ndarray:
    """`_macro` of resampled confusion matrices, `(draws, 3)`."""
    true, predicted = np.nonzero(counts)
    cells, right = counts[true, predicted], true == predicted

    def each(classes: np.ndarray) -> Any:
        """Which cell adds to which class, a sparse `(cells, classes)`."""
        place = (np.arange(len(classes)), classes)
        return sparse.csr_array((np.ones(len(classes)), place), (len(classes), counts.shape[1]))

    hits, support, guessed = each(true[right]), each(true), each(predicted)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(0, NUM_BOOTSTRAP_DRAWS, _BOOTSTRAP_CHUNK):
        drawn = rng.multinomial(cells.sum(), cells / cells.sum(), size=_BOOTSTRAP_CHUNK)
        totals = (drawn[:, right] @ hits, drawn @ support, drawn @ guessed)
        draws.append(_macro(*(total[:, :-1] for total in totals)))
    return np.concatenate(draws)


def classification_metrics(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics of `METRICS` with 95 % intervals.

    Args:
        predictions: Predicted class of every image; `NO_CLASS` is wrong, and no class's guess.
        references: True class of every image.
        num_classes: How many classes there are, also those that no image has.
        seed: Of the bootstrap.

    Returns:
        By name: the Wilson interval for accuracy, for macro means the percentile interval of 1,000
        resampled confusion matrices (widened to hold the estimate where it is at an end).

    Raises:
        UserError: No images, or classes outside `range(num_classes)`.
    """
    counts = confusion_counts(predictions, references, num_classes)
    low, high = np.quantile(_bootstrap(counts, seed), (0.025, 0.975), axis=0)
    intervals = [wilson_interval(int(counts.trace()), int(counts.sum()))]
    intervals += zip(low.tolist(), high.tolist(), strict=True)
    return {
        name: Estimate(value, min(low, value), max(high, value))
        for (name, value), (low, high) in zip(_values(counts).items(), intervals, strict=True)
    }


def paired_difference(
    correct_a: Sequence[bool] | np.ndarray, correct_b: Sequence[bool] | np.ndarray
) -> Difference:
    """Compare two models, or one on two channel sets, image by image.

    The interval of Agresti and Min, Statistics in Medicine 24 (2005): Wald's after half an image is
    added to every cell. It holds its level where few images differ, which the interval of the
    binomial among those alone does not: their number is itself by chance. The test is McNemar's
    exact one.

    Args:
        correct_a: Whether a was right, one value an image.
        correct_b: Whether b was, on the same images in the same order.

    Returns:
        The difference in accuracy (a - b), its 95 % interval and the two-sided p-value.

    Raises:
        UserError: No images, or different numbers of them.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UserError(
            f"Shapes {a.shape} and {b.shape} cannot be paired; give one value an image for the "
            f"same images in the same order."
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    n = a.size + 2
    centre, difference = (only_a - only_b) / n, (only_a - only_b) / a.size
    error = np.sqrt(discordant + 1 - (only_a - only_b) ** 2 / n) / n
    low, high = stats.norm.interval(0.95, centre, error)
    p = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    # Shrunk towards 0, so that the estimate may lie outside near -1 and 1.
    low, high = max(-1.0, min(low, difference)), min(1.0, max(high, difference))
    return Difference(difference, float(low), float(high), p)
