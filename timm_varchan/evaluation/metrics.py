"""Classification metrics that work offline, with 95 % intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, stats

from timm_varchan.errors import UserError

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

    def __str__(self) -> str:
        """In per cent, with the interval."""
        value, low, high = (100 * part for part in self)
        return f"{value:.1f} ({low:.1f} to {high:.1f})"


class Difference(NamedTuple):
    """Accuracy of a minus accuracy of b on the same images, its 95 % interval, and a p-value."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        """In points of per cent, with the interval."""
        value, low, high = (100 * part for part in self[:3])
        return f"{value + 0.0:+.1f} ({low:+.1f} to {high:+.1f})"


def confusion_cells(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """The cells of the confusion matrix that are not 0; they grow with the images alone.

    Returns:
        Rows of true class, predicted class (`num_classes`: no answer) and number of images.

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
    answers = np.where(predictions == NO_CLASS, num_classes, predictions)
    pairs, counts = np.unique(np.stack([references, answers], 1), axis=0, return_counts=True)
    return np.column_stack([pairs, counts])


def _summed(classes: np.ndarray, counts: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts by class; "no answer" is none."""
    return np.bincount(classes, counts, num_classes + 1)[:num_classes]


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


def _bootstrap(cells: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """`_macro` of resampled confusion matrices, `(draws, 3)`."""
    true, predicted, counts = cells.T
    right = true == predicted

    def each(classes: np.ndarray) -> Any:
        """Which cell adds to which class, a sparse `(cells, classes)`."""
        place = (np.arange(len(classes)), classes)
        return sparse.csr_array((np.ones(len(classes)), place), (len(classes), num_classes + 1))

    hits, support, guessed = each(true[right]), each(true), each(predicted)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(0, NUM_BOOTSTRAP_DRAWS, _BOOTSTRAP_CHUNK):
        drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=_BOOTSTRAP_CHUNK)
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
        resampled confusion matrices (widened to hold the estimate where it is at an end). The
        macro means are those of scikit-learn.

    Raises:
        UserError: No images, or classes outside `range(num_classes)`.
    """
    cells = confusion_cells(predictions, references, num_classes)
    true, predicted, counts = cells.T
    right = true == predicted
    hits = _summed(true[right], counts[right], num_classes)
    macro = _macro(
        hits, _summed(true, counts, num_classes), _summed(predicted, counts, num_classes)
    )
    low, high = np.quantile(_bootstrap(cells, num_classes, seed), (0.025, 0.975), axis=0)
    num_right, total = int(hits.sum()), int(counts.sum())
    values = [num_right / total, *macro.tolist()]
    intervals = [wilson_interval(num_right, total), *zip(low.tolist(), high.tolist(), strict=True)]
    return {
        name: Estimate(value, min(low, value), max(high, value))
        for name, value, (low, high) in zip(METRICS, values, intervals, strict=True)
    }


def paired_difference(
    correct_a: Sequence[bool] | np.ndarray, correct_b: Sequence[bool] | np.ndarray
) -> Difference:
    """Compare two models, or one on two channel sets, image by image.

    The interval of Agresti and Min, Statistics in Medicine 24 (2005): Wald's after half an image is
    added to every cell. It holds its level where few images differ, which the interval of the
    binomial among those alone does not: their number is itself by chance. The test is McNemar's
    exact one; of shares its normal form.

    Args:
        correct_a: Whether a was right, one value an image; or in which share of several channel
            sets or seeds, in 0..1.
        correct_b: Whether b was, on the same images in the same order.

    Returns:
        The difference in accuracy (a - b), its 95 % interval and the two-sided p-value.

    Raises:
        UserError: No images, different numbers of them, or values outside 0..1.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UserError(
            f"Shapes {a.shape} and {b.shape} cannot be paired; give one value an image for the "
            f"same images in the same order."
        )
    both = np.stack([a, b])
    if not ((both >= 0) & (both <= 1)).all():
        raise UserError("Whether an image was right is a value in 0..1; others came.")
    total, squares = float((a - b).sum()), float(((a - b) ** 2).sum())
    n = a.size + 2
    centre, difference = total / n, total / a.size
    error = np.sqrt(squares + 1 - total**2 / n) / n
    low, high = stats.norm.interval(0.95, centre, error)
    if not squares:
        p = 1.0
    elif np.isin(both, (0, 1)).all():
        p = float(stats.binomtest(int((a > b).sum()), int(squares)).pvalue)
    else:
        p = float(2 * stats.norm.sf(abs(total) / np.sqrt(squares)))
    # Shrunk towards 0, so that the estimate may lie outside near -1 and 1.
    low, high = max(-1.0, min(low, difference)), min(1.0, max(high, difference))
    return Difference(difference, float(low), float(high), p)
